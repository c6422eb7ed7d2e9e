"""What leaves a run: the sampling contract, the diffusers folder, its card, and the upload."""
