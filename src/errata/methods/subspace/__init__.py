"""ReFT and BaFT: an edit of the residual stream inside a learned subspace, with or without gates."""
