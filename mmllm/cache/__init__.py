"""What a frozen part gives for a medium, kept on disk: content-addressed, memory-mapped, shared by many processes."""
