# Faults made to happen, and what finds leaks and races. Included by the Makefile.
#
#   make faults          every fault at every call, and 300 kills (make test draws from them)
#   make leaks           whole runs under LeakSanitizer and Valgrind
#   make tsan            the threads that are not OpenMP's, under Helgrind

INJECT = build/faults/inject.so
tests-built: $(INJECT)

$(INJECT): $(wildcard tests/faults/*.c tests/faults/*.h)
	@mkdir -p $(@D)
	@echo "  CC   $@"
	@$(CC) -std=gnu17 -D_GNU_SOURCE -O1 -g -fPIC -shared -fno-builtin $(WARNINGS) $(filter %.c,$^) -o $@ -ldl
