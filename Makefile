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

# The main job on CPU, in minutes, with the bundled model: pictures by seed, mixing, a video; then its faces become a data
# set, on which a training starts, is stopped, goes on, and draws samples. Pictures land in demo/.
MODEL      ?= checkpoints/face-wpp-32.safetensors
DEMO       ?= demo
DEMO_TRAIN := --path $(DEMO)/faces.lmdb --size 32 --exp_name $(DEMO)/training --channel_max 64 --batch 8 --n_sample 16 \
              --r1 0.1 --augment --device cpu --workers 1 --log_every 10

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(PY) generate.py --ckpt $(MODEL) --seeds 0-99 --truncation 0.8 --noise none --grid --output_dir $(DEMO)/faces --device cpu
	mv $(DEMO)/faces/grid.png $(DEMO)/1-faces-by-seed.png
	$(PY) generate.py --ckpt $(MODEL) --mix 0-4 10-17 --mix_layers 0-3 --truncation 0.8 --noise none --output_dir $(DEMO) --device cpu
	mv $(DEMO)/mix.png $(DEMO)/2-style-mixing.png
	$(PY) generate.py --ckpt $(MODEL) --seeds 0-5 --truncation 0.8 --noise none --interpolate --frames 20 --video $(DEMO)/3-interpolation.gif \
	  --output_dir $(DEMO) --device cpu
	$(PY) prepare_data.py --out $(DEMO)/faces.lmdb --size 32 --n_worker 2 $(DEMO)/faces
	$(PY) train.py $(DEMO_TRAIN) --init_from $(MODEL) --iter 20 --sample_every 20 --save_every 20
	$(PY) train.py $(DEMO_TRAIN) --resume auto --iter 40 --sample_every 20 --save_every 20
	cp $(DEMO)/training/sample/000040.png $(DEMO)/4-training-sample.png
	cp $(DEMO)/training/similarity/000040.png $(DEMO)/5-attention-maps.png
	@echo
	@echo "$(DEMO)/1-faces-by-seed.png    100 faces drawn by the bundled W++ model, truncation 0.8"
	@echo "$(DEMO)/2-style-mixing.png     rows keep their fine layers, coarse layers come from the columns"
	@echo "$(DEMO)/3-interpolation.gif    a closed walk through six faces in w"
	@echo "$(DEMO)/4-training-sample.png  after 40 steps of training on those faces, stopped and resumed at step 20"
	@echo "$(DEMO)/5-attention-maps.png   attention between the style tokens, eight blocks by four heads"

test: $(VENV)/.installed
	$(PY) -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .

# The whole pipeline, tiny, on real faces: faces -> LMDB -> W++ training, continued from its checkpoint -> W training -> samples
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
	@echo "6,400 images are enough for colours and blobs; silhouettes come at 16,000, faces at 100,000 (docs/results.md)"

bench: $(VENV)/.installed
	$(PY) benchmarks/bench_model.py

clean:
	rm -rf demo runs .pytest_cache .ruff_cache
