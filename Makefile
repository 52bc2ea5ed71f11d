# Two commands are enough: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
DATA   ?= ../shared/data
TINY   ?= runs/tiny

.PHONY: demo test lint tiny bench clean

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

# The main job on what is at hand, on CPU, in minutes; pictures land in demo/
demo: $(VENV)/.installed
	$(PY) make_demo.py --output_dir demo

test: $(VENV)/.installed
	$(PY) -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .

# The whole pipeline, tiny, on real faces: faces -> LMDB -> W++ and W training -> killed and resumed -> samples
tiny: $(VENV)/.installed
	$(PY) prepare_data.py --out $(TINY)/faces.lmdb --size 32 --n_worker 2 $(DATA)/faces
	$(PY) train.py --path $(TINY)/faces.lmdb --size 32 --exp_name $(TINY)/wpp --channel_max 32 --n_mlp 4 --batch 16 \
	  --r1 0.1 --augment --iter 100 --sample_every 100 --save_every 100 --log_every 50 --n_sample 36 --resume auto
	$(PY) train.py --path $(TINY)/faces.lmdb --size 32 --exp_name $(TINY)/wpp --channel_max 32 --n_mlp 4 --batch 16 \
	  --r1 0.1 --augment --iter 400 --sample_every 200 --save_every 200 --log_every 50 --n_sample 36 --resume auto
	$(PY) train.py --path $(TINY)/faces.lmdb --size 32 --exp_name $(TINY)/w --channel_max 32 --n_mlp 4 --batch 16 --w_space \
	  --r1 0.1 --augment --iter 400 --sample_every 200 --save_every 200 --log_every 50 --n_sample 36 --resume auto
	$(PY) generate.py --ckpt $(TINY)/wpp/checkpoint/000400.pt --seeds 0-35 --grid --output_dir $(TINY)/generated
	@echo "samples: $(TINY)/wpp/sample, $(TINY)/w/sample; pictures by seed: $(TINY)/generated"

bench: $(VENV)/.installed
	$(PY) benchmarks/bench_model.py

clean:
	rm -rf demo runs .pytest_cache .ruff_cache
