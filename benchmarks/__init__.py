"""Benchmarks: kernel operations as data, one runner, results and a table per device;
the whole model; tokenizer.

python -m benchmarks                  time every operation on this machine's fastest device
python -m benchmarks --device cpu     on the CPU even where there is a GPU
python -m benchmarks --aot            compile for sm_90 and sm_100 instead: registers, memory
python -m benchmarks.model train      the whole model against transformers on a CPU
python -m benchmarks.tokenizer        training, encoding and round trips of the tokenizer
"""
