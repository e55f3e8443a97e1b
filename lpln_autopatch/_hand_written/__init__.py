"""The norms that classes write out: which classes do, and what their forwards run instead."""
