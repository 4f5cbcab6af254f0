export PYTHONPATH=/work/wt/a:/work/wt/a/classification:/work/wt/a/detection:/work/wt/a/segmentation:/work/wt/a/vrwkv_ops/src PATH=/work/main/.venv/bin:$PATH OMP_NUM_THREADS=1
cd /work/wt/a
