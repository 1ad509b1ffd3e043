#!/bin/sh
# The C compiler of tests: TESTS_CC with TESTS_CFLAGS, which conftest.py sets. The last -O counts: -O1 takes 0.6 of the
# time that -O2 takes for kernels of tiny models.
exec "$TESTS_CC" "$@" $TESTS_CFLAGS
