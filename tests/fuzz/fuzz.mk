# libFuzzer targets: every reader of files, with the product's sources under ASan and UBSan. Included by the
# Makefile.
#
# Built by clang, whatever CC is: GCC has no libFuzzer. Without OpenMP, see tests/fuzz/omp.h, and for any
# processor of the architecture, so that an input found on one machine does the same on another.
FUZZ_CC ?= clang
FUZZ_BUILD = build/fuzz
FUZZ_SECONDS ?= 600
FUZZ_WARNINGS = -Wall -Wextra $(ERRORS) -Wno-unknown-pragmas
FUZZ_SANITIZERS = address,undefined -fno-sanitize-recover=undefined
FUZZ_CFLAGS = -std=gnu17 -g -O1 -fno-omit-frame-pointer -I. -Itests/fuzz $(FUZZ_WARNINGS)
FUZZ_OBJECTS = $(patsubst %.c,$(FUZZ_BUILD)/%.o,$(filter-out %_mpi.c $(BF16_ALONE),$(KERNELS)) $(MODEL) $(DATA))
FUZZ_TARGETS = $(patsubst tests/fuzz/%.c,$(FUZZ_BUILD)/%,$(wildcard tests/fuzz/fuzz_*.c))

.PHONY: fuzz fuzz-built
fuzz: deps
	@$(MAKE) --no-print-directory -j2 fuzz-built
	@tests/fuzz/run.sh long $(FUZZ_BUILD) $(FUZZ_SECONDS) $(FUZZ_ONLY)

fuzz-built: $(FUZZ_TARGETS)

$(FUZZ_BUILD)/compiler-found:
	@mkdir -p $(FUZZ_BUILD)
	@echo 'int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { return d && n ? 0 : 0; }' | \
	    $(FUZZ_CC) -fsanitize=fuzzer,$(FUZZ_SANITIZERS) -x c - -o $(FUZZ_BUILD)/probe 2>/dev/null || \
	    { echo "make: $(FUZZ_CC) with its sanitizers and libFuzzer (compiler-rt) is not installed; run: make deps" >&2; exit 2; }
	@touch $@

$(FUZZ_BUILD)/%.o: %.c | build/headers-found $(FUZZ_BUILD)/compiler-found
	@mkdir -p $(@D)
	@echo "  FUZZ $<"
	@$(FUZZ_CC) $(FUZZ_CFLAGS) -fsanitize=fuzzer-no-link,$(FUZZ_SANITIZERS) -MMD -MP -c $< -o $@

$(FUZZ_TARGETS): $(FUZZ_BUILD)/%: $(FUZZ_BUILD)/tests/fuzz/%.o $(FUZZ_OBJECTS)
	@echo "  LINK $@"
	@$(FUZZ_CC) -fsanitize=fuzzer,$(FUZZ_SANITIZERS) $^ -o $@ $(LIBS)
