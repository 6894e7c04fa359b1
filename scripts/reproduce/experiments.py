"""What `make reproduce` trains: the paper's synthetic tasks, its comparison of language models, retrieval, and MHA
models continued as IHA.

An experiment is a configuration, variants of it, and a budget. Facts of the paper and
what it leaves open: docs/reproduction/discussion.md.
"""

from dataclasses import dataclass, field

MHA = ("model.layer_pattern=mha_global",)
FOLDED = ("model.layer_pattern=folded_global",)
TALKING = ("model.layer_pattern=talking_global",)
DIFF = ("model.layer_pattern=diff_global",)
SIMPLICIAL = ("model.layer_pattern=simplicial_global",)


def iha(pseudo_heads, pattern="iha_global"):
    return (f"model.layer_pattern={pattern}", f"model.num_pseudo_heads={pseudo_heads}")


@dataclass(frozen=True)
class Variant:
    label: str
    overrides: tuple
    seeds: int = 0  # 0: as many as the experiment
    learning_rates: tuple = ()  # of its sweep; none: the experiment's
    rate_of: str = ""  # the variant whose learning rate it takes; none: its own sweep
    flops_of: str = ""  # with a start: steps are scaled to as many FLOPs as this other variant takes


@dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    config: str
    data: dict  # folders of shards, and for each the command that makes them, after the Python of .venv
    variants: dict
    figure: str  # what is compared: val_accuracy, val_exact or val_loss
    seeds: int
    overrides: tuple = ()  # for all variants
    quick: tuple = ()  # overrides of QUICK=1, which trains one seed
    not_quick: tuple = ()  # variants that QUICK=1 leaves out
    flops_of: str = ""  # the others get as many FLOPs, and also as much time, as this variant
    learning_rates: tuple = ()  # of the sweep that chooses each variant's; none: that of the configuration
    test: str = ""  # shards evaluated in the end, besides those of the validation; {length} stands for each of:
    lengths: tuple = ()  # in tokens
    paper: dict = field(default_factory=dict)  # what the paper reports, by variant
    start: tuple = ()  # overrides of a run of each seed whose weights all variants continue with


def composition(name, variants, paper):
    folder = f"data/{name}"
    return Experiment(
        name=name, title=f"{name.capitalize()} composition of boolean matrices", config=f"configs/synthetic/{name}.ini",
        data={folder: ("data/tasks.py", name, "--out", folder)}, variants=variants, figure="val_accuracy",
        seeds=3, overrides=("train.epochs=10",), quick=("train.epochs=none", "train.steps=800", "run.eval_every=200",
                                                        "run.eval_batches=40"),
        not_quick=("simplicial", "iha_p8"), test=f"{folder}/test_*.bin", paper=paper)


BINARY = composition("binary", {
    "mha": Variant("MHA", MHA),
    "folded": Variant("folded P = 1", FOLDED),
    "talking": Variant("Talking Heads", TALKING),
    "diff": Variant("Diff", DIFF),
    "iha_p2": Variant("IHA P = 2", iha(2)),
    "iha_p4": Variant("IHA P = 4", iha(4)),
    "iha_p8": Variant("IHA P = 8", iha(8), seeds=1),
    "simplicial": Variant("2-simplicial", SIMPLICIAL, seeds=1),
}, {"iha_p8": "best; up to 4.7 points above the strongest baseline", "simplicial": "the strongest baseline"})

TERNARY = composition("ternary", {
    "mha": Variant("MHA", MHA, seeds=1),
    "simplicial": Variant("2-simplicial", SIMPLICIAL, seeds=1),
    "iha_p2": Variant("IHA P = 2", iha(2), seeds=1),
    "iha_p4": Variant("IHA P = 4", iha(4), seeds=1),
}, {"simplicial": "the strongest baseline"})

BIBLE = {"data/bible": ("data/prepare.py", "--tokenizer", "bytes", "--document-separator", "blank-lines", "--out",
                        "data/bible", "data/corpus/bible.txt")}

LANGUAGE = Experiment(
    name="lm", title="Language models of one size", config="configs/paper/family_4m.ini", data=BIBLE,
    variants={
        "global": Variant("Global", MHA),
        "global_local": Variant("Global+Local", ("model.layer_pattern=mha_local*4 mha_global", "model.local_window=16")),
        "talking": Variant("Talking Heads", TALKING),
        "diff": Variant("Diff", DIFF),
        "folded": Variant("folded P = 1", FOLDED),
        "iha_p2": Variant("IHA P = 2", iha(2, "iha_local*4 mha_global")),
        "iha_p4": Variant("IHA P = 4", iha(4, "iha_local*4 mha_global")),
    },
    figure="val_loss", seeds=4, overrides=("train.steps=1500",), quick=("train.steps=250", "run.eval_every=50"),
    flops_of="global", learning_rates=(7.5e-4, 1.5e-3, 3e-3, 6e-3))


def multikey_data(length, *more):
    folder = f"data/multikey_{length}"
    return folder, ("data/tasks.py", "multikey", "--form", "ids", "--length", str(length), *more, "--out", folder)


# Trained on sequences of up to 128 tokens, evaluated also on longer ones.
MULTIKEY = Experiment(
    name="multikey", title="Multi-key retrieval", config="configs/synthetic/multikey.ini",
    data=dict([multikey_data(16, "--train", "200000"), multikey_data(32), multikey_data(64),
               *(multikey_data(length, "--val", "1000", "--test", "2000") for length in (128, 256, 512))]),
    variants={
        "mha": Variant("MHA", MHA),
        "folded": Variant("folded P = 1", FOLDED),
        "iha_p2": Variant("IHA P = 2", iha(2, "iha_global*3 mha_global")),
    },
    figure="val_exact", seeds=3, quick=("train.steps=400",), test="data/multikey_{length}/test_*.bin",
    lengths=(128, 256, 512), paper={"iha_p2": "27, 32 and 112 % above Global at 4k, 8k and 16k tokens"})


# The rate stays constant in the first half and decays to zero in the second, whose optimizer starts anew in all variants.
DECAY = ("train.schedule=linear", "train.min_lr=0", "train.warmup_steps=20")
UPCYCLED = (*DECAY, "model.layer_pattern=iha_global")

UPCYCLING = Experiment(
    name="upcycling", title="A model trained as MHA, continued as MHA and as IHA", config="configs/upcycling.ini",
    data=BIBLE, start=("train.schedule=constant",),
    variants={
        "mha": Variant("MHA", DECAY),
        "mha_flops": Variant("MHA, as many FLOPs as IHA", DECAY, flops_of="iha"),
        "iha": Variant("IHA, exact (last, identity)", UPCYCLED),
        "iha_noise": Variant("IHA, last, identity + noise", (*UPCYCLED, "model.init_alpha=noise")),
        "iha_mean": Variant("IHA, mean, identity", (*UPCYCLED, "model.init_collapse=mean")),
        "iha_rate": Variant("IHA, noise, 10 times the rate for mixing",
                            (*UPCYCLED, "model.init_alpha=noise", "train.mix_lr_scale=10")),
    },
    figure="val_loss", seeds=4, overrides=("train.steps=800",), quick=("train.steps=60", "train.warmup_steps=10"),
    test="data/bible/val_*.bin")


EXPERIMENTS = {each.name: each for each in (BINARY, TERNARY, LANGUAGE, MULTIKEY, UPCYCLING)}
