# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # jaxserve in ten cells
#
# Load a model, generate, stream, and look at what one step of the engine computes. Runs on a CPU
# (Colab's free runtime will do); on a GPU or TPU runtime the same cells use the accelerator.
#
# In Colab, first clone the repository and change into it; in a checkout the next cell finds it.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxserve") is None:  # not installed yet: install the checkout
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "..[notebooks]"], check=True)

# %% tags=["parameters"]
MODEL = "demo"  # SmolLM2-135M-Instruct; or a hub id, an HF folder, a .gguf file, an Orbax folder

# %% [markdown]
# ## Load
#
# The first start compiles the step for a handful of shapes and keeps them on disk; the second start
# finds them there.

# %%
from jaxserve import LLM, SamplingParams

llm = LLM(MODEL, context_length=512)
llm.model_info

# %% [markdown]
# ## Generate
#
# Several prompts at once share every step. Temperature 0 takes the most likely token; with a seed,
# sampling gives the same tokens whatever else is in the batch.

# %%
greedy = SamplingParams(temperature=0, max_tokens=24)
for completion in llm.generate(["The capital of France is", "1, 2, 3, 4,"], greedy):
    print(repr(completion.text), completion.finish_reason.value)

question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
print(llm.chat(question, SamplingParams(temperature=0.7, seed=7, max_tokens=24))[0].text)

# %% [markdown]
# ## Stream

# %%
for piece in llm.stream(question, greedy):
    print(piece, end="", flush=True)

# %% [markdown]
# ## Look at one step
#
# There is no prefill and no decode mode: each step computes some new tokens of every request, laid
# side by side and padded to a compiled shape, a *bucket*. Below, the scheduler meets two requests
# that already generate and two prompts that have just come.

# %%
from jaxserve.request import Request
from jaxserve.scheduler.buckets import make_buckets
from jaxserve.scheduler.scheduler import Scheduler

scheduler = Scheduler(
    num_pages=64,
    page_size=4,
    max_rows=4,
    max_tokens_per_step=32,
    max_model_len=64,
    buckets=make_buckets(32, 4),
)


def arrive(name: str, prompt_tokens: int) -> None:
    scheduler.add(Request(name, list(range(prompt_tokens)), prompt_tokens, greedy))


arrive("a", 9)
arrive("b", 5)
first = scheduler.schedule()
scheduler.update(first, [[0] * len(first.ranks[0])])
arrive("c", 11)
arrive("d", 6)
step = scheduler.schedule()
for row in step.ranks[0]:
    print(f"request {row.request.id}: computes tokens {row.start}..{row.start + row.num_new - 1}")
print("bucket:", step.bucket)

# %% [markdown]
# Left: the step's tokens, and the padding that the bucket adds. Right: which keys each token may
# attend to. Every request sees only its own pages, and only the past; the work is proportional to
# the coloured cells, not to the square of the bucket.

# %%
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

rows = step.ranks[0]
owner = np.full((1, step.bucket.tokens), -1)
seen = np.full((step.bucket.tokens, sum(r.start + r.num_new for r in rows)), -1)
token = key = 0
for number, row in enumerate(rows):
    for position in range(row.start, row.start + row.num_new):
        owner[0, token] = number
        seen[token, key : key + position + 1] = number
        token += 1
    key += row.start + row.num_new

colours = ListedColormap(["#eeeeee", "#4477aa", "#66ccee", "#ee6677", "#ccbb44"])
figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(8, 6), gridspec_kw={"height_ratios": [1, 8]}, constrained_layout=True
)
top.imshow(owner, cmap=colours, vmin=-1, vmax=3, aspect="auto")
top.set(title=f"tokens of one step: {token} live, {step.bucket.tokens - token} padding", yticks=[])
bottom.imshow(seen, cmap=colours, vmin=-1, vmax=3, aspect="auto", interpolation="nearest")
bottom.set(title="attention", xlabel="keys in each request's pages", ylabel="token of the step")
start = 0
for row in rows:
    length = row.start + row.num_new
    bottom.text(start + length / 2, step.bucket.tokens - 1.5, row.request.id, ha="center")
    start += length
plt.show()

# %%
llm.close()
