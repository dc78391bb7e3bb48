"""Measures a running cluster from outside, as a client sees it. Not responsible for predicting anything (`sim/`)."""
