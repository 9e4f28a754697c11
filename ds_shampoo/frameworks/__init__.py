"""One folder for each host framework; nothing outside names an attribute of theirs."""
