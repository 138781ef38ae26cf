"""Tests of one source file each, in the source's own folders."""
