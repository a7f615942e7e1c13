"""What is on the device and what on the host: budgets, residency, copies between them."""
