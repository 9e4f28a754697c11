"""What people see of a job: the table and the warnings at start, and the metrics."""
