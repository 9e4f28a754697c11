"""What is known of parameters before anything is built: names, roles, patterns, and what wrappers made of them."""
