"""Small commands around the toolkit: doctor, report, figures."""
