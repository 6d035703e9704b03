"""FT-L, FT-M and LocFT: one MLP matrix trained, its change beside the frozen one."""
