"""Questions for the tests of the metrics."""

from layerif.data.render import Example
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PATTERN = r"Answer: (\w+)"


def example(index: int) -> Example:
    """Two to four options of different lengths; prompts from short to past the tiny models' sliding window of 16."""
    labels = ("Paris", "Rome", "a much longer one", "x")[: 2 + index % 3]
    options = tuple(f"Answer: {label}." for label in labels)
    return Example(f"q{index}", f"Question: {'what' + ' of it' * (3 * index % 11)}?\n", options, labels, index % 2)


EXAMPLES = [example(index) for index in range(7)]
