"""What a certified model does on data: radii, accuracy, attacks that must fail, lower bounds."""
