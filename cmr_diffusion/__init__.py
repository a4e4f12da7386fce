"""Synthetic short-axis cardiac MR with a semantic diffusion model."""
__version__ = "0.1.0"
