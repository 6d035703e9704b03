"""REP: keys made robust, around any method of `errata.methods.locate`."""
