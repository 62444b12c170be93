"""Measure: settings x tasks give the rows of one result file. Imports every room but `cli`, `report` and
`pretraining`.
"""
