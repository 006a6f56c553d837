# The node in a ROS 2 distribution.
#   docker build -f docker/distro.Dockerfile -t nope_ros .
#   docker run --rm --net=host --ipc=host --gpus all -v nope_objects:/root/.local/share/nope_ros nope_ros \
#       ros2 launch nope_ros nope.launch.py image:=/camera/color/image_raw camera_info:=/camera/color/camera_info mask:=/segmentation/mask
# --ipc=host: Fast DDS's shared memory is shared with the camera's driver. Without a GPU leave --gpus out.
ARG DISTRO=jazzy
FROM ros:${DISTRO}-perception
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
SHELL ["/bin/bash", "-c"]
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3-pip ros-${ROS_DISTRO}-vision-msgs ros-${ROS_DISTRO}-tf-transformations \
    && rm -rf /var/lib/apt/lists/*
# CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128. The distribution's NumPy and OpenCV stay: cv_bridge
# was built with them. The typing_extensions that pydantic needs goes beside the distribution's, which pip can't uninstall;
# torch needs a newer setuptools, and colcon one before 80.
RUN pip install --no-cache-dir --break-system-packages 'setuptools>=77.0.3,<80' \
    && pip install --no-cache-dir --break-system-packages --ignore-installed typing_extensions \
    && pip install --no-cache-dir --break-system-packages torch --index-url ${TORCH_INDEX} \
    && pip install --no-cache-dir --break-system-packages \
        'numpy<2' diffusers safetensors 'rosbags>=0.10' 'rosbags-image>=0.9' 'pydantic>=2.7' rich tqdm matplotlib
COPY . /workspace/src/nope_ros
RUN source /opt/ros/${ROS_DISTRO}/setup.bash && cd /workspace \
    && colcon build --packages-select nope_ros --cmake-args -DBUILD_TESTING=OFF
ENV FASTDDS_DEFAULT_PROFILES_FILE=/workspace/install/nope_ros/share/nope_ros/config/fastdds.xml \
    FASTRTPS_DEFAULT_PROFILES_FILE=/workspace/install/nope_ros/share/nope_ros/config/fastdds.xml
RUN printf '#!/bin/bash\nsource /workspace/install/setup.bash\nexec "$@"\n' > /start.sh && chmod +x /start.sh
ENTRYPOINT ["/start.sh"]
CMD ["ros2", "launch", "nope_ros", "nope.launch.py"]
