"""The step: elementwise state, blocks and how they meet, on the ranks that share them."""
