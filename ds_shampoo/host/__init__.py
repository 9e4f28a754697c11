"""What the host CPU does for the accelerator: the schedule of inverse roots, and the roots themselves."""
