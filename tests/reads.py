"""What test_loading.py has workers read: here, so that a worker imports nothing else."""

import os

from asesearch.errors import DataError


def square(key):
    return key * key


def process_of(key):
    return os.getpid()


def refuse_the_third(key):
    if key == 2:
        raise DataError("can't read the image 2; replace it")
    return key


def break_at_the_third(key):
    if key == 2:
        raise ZeroDivisionError("2")
    return key
