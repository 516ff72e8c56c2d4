"""The tiny desk of the trainings' tests, for models to be made smaller."""

from tests.train.conftest import data as data
from tests.train.conftest import tokenizer as tokenizer
