"""The algorithm on plain tensors: blocks, statistics, roots, preconditioning, grafting. No process group, no DeepSpeed."""
