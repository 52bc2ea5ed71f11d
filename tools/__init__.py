"""Small commands around the toolkit: doctor, figures."""
