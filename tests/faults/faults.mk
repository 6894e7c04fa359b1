# Fault injection, and leak and race detectors. Included by the Makefile.

INJECT = build/faults/inject.so
LEAKS = build/leaks/train_iha
# For thousands of runs: without the CUDA libraries, which take a tenth of a second to load.
QUICK = $(BUILD)/quick/train_iha
WHOLE_RUNS = .venv/bin/python -m tests.faults.whole_runs
tests-built: $(INJECT) $(QUICK)
ifneq ($(SANITIZE),1)
tests-built: $(LEAKS)
endif

.PHONY: faults leaks tsan

faults: deps
	@$(MAKE) --no-print-directory $(QUICK) $(INJECT)
	@FAULTS=all TRAIN_IHA=$(QUICK) .venv/bin/python -m unittest -v tests.faults.test_faults tests.faults.test_ranks_anomalies

# Valgrind supports neither AVX-512 nor SVE, so its binary is built without it.
WATCHED = -std=gnu17 -g -O1 -march=$(PORTABLE_ARCH) -fopenmp -I. $(MPI_FLAGS) $(WARNINGS)
leaks: deps
	@command -v valgrind >/dev/null || { echo "make: valgrind is not installed: apt-get install valgrind" >&2; exit 2; }
	@$(MAKE) --no-print-directory $(LEAKS)
	@$(MAKE) --no-print-directory SANITIZE=1
	@$(MAKE) --no-print-directory CUDA=0 BUILD=build/valgrind CFLAGS="$(WATCHED)" BINARY=build/valgrind/train_iha
	$(WHOLE_RUNS) lsan $(LEAKS)
	$(WHOLE_RUNS) lsan build/sanitize/train_iha
	$(WHOLE_RUNS) valgrind build/valgrind/train_iha

tsan: deps
	@$(MAKE) --no-print-directory CUDA=0 BUILD=build/tsan CFLAGS="$(WATCHED) -fsanitize=thread" BINARY=build/tsan/train_iha
	$(WHOLE_RUNS) tsan build/tsan/train_iha

$(INJECT): $(wildcard tests/faults/*.c tests/faults/*.h)
	@mkdir -p $(@D)
	@echo "  CC   $@"
	@$(CC) -std=gnu17 -D_GNU_SOURCE -O1 -g -fPIC -shared -fno-builtin $(WARNINGS) $(filter %.c,$^) -o $@ -ldl

$(QUICK): $(BUILD)/train_iha.o $(KERNEL_OBJECTS) $(OTHER_OBJECTS)
	@mkdir -p $(@D)
	@echo "  LINK $@"
	@$(CC) $(CFLAGS) $^ -o $@ $(LIBS)

# LeakSanitizer needs only another link: the objects are the program's.
$(LEAKS): $(BUILD)/train_iha.o $(KERNEL_OBJECTS) $(OTHER_OBJECTS)
	@mkdir -p $(@D)
	@echo "  LINK $@"
	@$(CC) $(CFLAGS) -fsanitize=leak $^ -o $@ $(LIBS)
