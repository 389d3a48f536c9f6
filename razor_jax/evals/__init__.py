"""Evaluations: does a compressed cache hold?"""
