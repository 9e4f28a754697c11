"""What outlives a step: blocks in state dicts, and in files of their own beside a checkpoint of DeepSpeed's."""
