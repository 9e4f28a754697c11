"""Who holds which slice of which parameter, who owns which block, and how the two come together."""
