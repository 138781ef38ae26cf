"""Contracts that every implementation keeps: the store on two databases, every engine."""
