"""What a checkpoint keeps of Shampoo's blocks: files that any world size can read, keyed by logical block."""
