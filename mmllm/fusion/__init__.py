"""Media inside the backbone's blocks instead of among its token embeddings."""
