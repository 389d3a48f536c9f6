"""What a mesh adds to the spine: where caches are stored, and how devices exchange what they computed."""

from .placement import Layout, MeshPlacement

__all__ = ["Layout", "MeshPlacement"]
