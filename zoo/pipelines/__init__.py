"""Samplers for students that no stock pipeline can feed."""
