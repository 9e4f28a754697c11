"""DeepSpeed's own tests with Shampoo in Adam's place: what passes, what is refused as expected, what fails."""
