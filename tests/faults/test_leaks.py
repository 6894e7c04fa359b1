#!/usr/bin/env python3
"""No command leaks memory, with good or bad input.

    make tests-built && python -m unittest tests.faults.test_leaks

`make leaks` does the same under Valgrind, and `make tsan` looks for races.
"""

import os
import unittest

from tests.faults import harness, whole_runs

BINARY = harness.BINARY if harness.SANITIZED else harness.ROOT / "build" / "leaks" / "train_iha"


class Leaks(unittest.TestCase):
    @unittest.skipUnless(os.path.exists(BINARY), "needs make tests-built")
    def test_no_command_leaks(self):
        wrong = whole_runs.main("lsan", BINARY)
        self.assertEqual(len(wrong), 0, "\n".join(wrong))


if __name__ == "__main__":
    unittest.main()
