"""The algorithm on plain tensors: blocks, statistics, roots, directions, grafting; no process group, no DeepSpeed."""
