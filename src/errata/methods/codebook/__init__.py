"""GRACE and MELO: keys with radii beside a linear; what is stored answers where a prompt's key is near."""
