"""The node: parameters, topics and services around the walk of one frame (see ``nope_ros.node.estimation``).

Threads: callbacks of inputs only store messages; one worker thread takes the newest complete frame and estimates;
services have threads of their own. So nothing queues behind the network, whatever the camera's rate.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import numpy as np
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import CallbackGroup, MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from rclpy.qos import QoSPolicyKind
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Imu
from std_msgs.msg import String

from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.frame import InputError
from nope_ros.node import distro, health, messages, parameters, tf, topics
from nope_ros.node.complaints import Complaints
from nope_ros.node.estimation import estimate, load_estimator, use_threads
from nope_ros.node.gravity import Gravity, ImuGravity, ImuSample, history
from nope_ros.node.health import FrameTimes, Health, Meter, Rates, Sighting, Times
from nope_ros.node.outputs import Outputs
from nope_ros.node.pairing import FrameMessages, Kind, Pairing
from nope_ros.node.process import PatientExecutor, stop_signal
from nope_ros.node.registration import register, register_mesh, requested_messages
from nope_ros.node.stream import StreamRegistration
from nope_ros.srv import ListObjects, RegisterFromStream, RegisterObject, UnregisterObject
from nope_ros.stopwatch import stage, timed
from nope_ros.store import ObjectStore, StoreError, check_object_id
from nope_ros.tracking import Tracker
from nope_ros.video import KEYFRAMES, check_count, summary

# Inputs, registration, the other services, lifecycle and parameters, TF and IMU, diagnostics: none waits for another.
_THREADS = 6
# A problem stays in the diagnostics this long, seconds.
_REMEMBERED = 5.0
# A frame older than this is named with its age where an object is registered from it, in seconds.
_FRESH = 2.0


@dataclass(frozen=True)
class Session:
    """What exists while the node is active: model, what is followed, folder of objects, the thread that estimates."""

    estimator: PoseEstimator
    tracker: Tracker
    store: ObjectStore
    stop: threading.Event
    worker: threading.Thread
    began: float


Transition = Callable[["NopeNode", LifecycleState], TransitionCallbackReturn]


def _aloud(transition: Transition) -> Transition:
    """A transition whose exceptions are logged: rclpy turns them into a failure without a word."""

    @wraps(transition)
    def told(self: NopeNode, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(self, state)
        except Exception as error:
            self.get_logger().error(traceback.format_exc())
            self._refused = f"{type(error).__name__}: {error}"
            raise

    return told


class NopeNode(LifecycleNode):
    """See the module, and ``nope_ros.node.topics`` and ``nope_ros.node.parameters`` for its interface.

    Attributes:
        failure: what ended the worker thread, if something did.

    Raises:
        ParameterException: if a parameter given at start is refused.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("nope", **options)
        self.failure: BaseException | None = None
        self._finished = False
        self.add_on_set_parameters_callback(self._check_parameters)
        self._session: Session | None = None
        try:
            parameters.declare(self)
            self._settings = parameters.read(self)
        except ParameterException:
            self.destroy_node()  # one that outlives ROS's shutdown has ended the process with a segmentation fault
            raise
        self.add_post_set_parameters_callback(self._use_parameters)

        self._complain = Complaints(self.get_logger().warning)
        for said in parameters.unknown(self):
            self.get_logger().warning(said)
        self._pairing = Pairing(patience=1, capacity=1)
        self._times = Times()
        self._meter = Meter()
        # When each input last said something, monotonic seconds.
        self._heard: dict[Kind, float] = {}
        self._trouble = ""
        # Why it could not be activated when that was tried last.
        self._refused = ""
        # Objects and their publishers are changed by services and read by the worker: replaced, never altered.
        self._objects: dict[str, RegisteredObject] = {}
        self._pose_publishers: dict[str, Publisher[Any]] = {}
        self._sightings: dict[str, Sighting] = {}
        self._registry = threading.RLock()
        self._stream: StreamRegistration | None = None
        self._tracked_in = ""
        self._marked: frozenset[str] = frozenset()
        self._transforms: distro.Transforms | None = None
        self._imu: ImuGravity | None = None
        self._imu_input: Any = None
        self._gravity = Gravity()
        self._outputs: dict[topics.Endpoint, Publisher[Any]] = {}
        self._inputs: dict[Kind, Any] = {}
        self._retired: deque[Callable[[], object]] = deque()
        self._use_parameters([])

        self._broadcaster = tf.broadcaster(self)
        self._diagnostics = self.create_publisher(topics.DIAGNOSTICS.type, topics.DIAGNOSTICS.name, 10)
        self._status = self.create_publisher(topics.STATUS.type, topics.STATUS.name, topics.latched_qos())
        self._said = ""
        # Not the node's clock, which may be a simulation's and stand still.
        clock = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = self.create_timer(
            1.0, self._diagnose, callback_group=MutuallyExclusiveCallbackGroup(), clock=clock
        )
        others = MutuallyExclusiveCallbackGroup()
        self._serve(topics.REGISTER, self._register, MutuallyExclusiveCallbackGroup())
        self._serve(topics.REGISTER_STREAM, self._register_stream, MutuallyExclusiveCallbackGroup())
        self._serve(topics.UNREGISTER, self._unregister, others)
        self._serve(topics.LIST, self._list, others)

    # --- lifecycle --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Configure and activate. What fails is logged, and the node waits for a lifecycle manager to try again."""
        if self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    @_aloud
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Make publishers and subscriptions."""
        for endpoint in (
            topics.POSES,
            topics.DETECTIONS,
            topics.DISTRIBUTION,
            topics.MARKERS,
            topics.OVERLAY,
            topics.PROGRESS,
        ):
            self._outputs[endpoint] = self._publisher(endpoint)
        image = topics.IMAGE_COMPRESSED if self._settings.compressed else topics.IMAGE
        inputs: list[tuple[Kind, topics.Endpoint]] = [
            ("image", image),
            ("camera_info", topics.CAMERA_INFO),
            ("mask", topics.MASK),
            ("depth", topics.DEPTH),
        ]
        for kind, endpoint in inputs:
            self._inputs[kind] = self._listen(endpoint.type, endpoint.name, partial(self._receive, kind))
        return super().on_configure(state)

    @_aloud
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model and the registered objects, and begin to estimate."""
        settings = self._settings
        try:
            estimator = load_estimator(settings)
            store = ObjectStore(settings.storage_directory)
            loaded = store.load_all(estimator.predictor, settings.batch_size)
        except InputError as error:
            self._refused = str(error)
            self.get_logger().error(f"Can't be activated. {error}")
            return TransitionCallbackReturn.FAILURE
        self._refused = ""
        if settings.gravity_imu_topic:
            self._imu_input = self._listen(Imu, settings.gravity_imu_topic, self._receive_imu)
            self._imu = ImuGravity(history(self._settings))
            self._use_parameters([])
        for problem in loaded.problems:
            self._complain(problem)
        for registered in loaded.objects:
            try:
                self._add(registered, overwrite=False)
            except InputError as error:
                self._complain(error)
        stop = threading.Event()
        worker = threading.Thread(target=self._work, args=(stop,), name="estimation", daemon=True)
        self._session = Session(estimator, Tracker(), store, stop, worker, time.monotonic())
        result = super().on_activate(state)
        worker.start()
        names = ", ".join(self._objects) or "none"
        self.get_logger().info(f"Active: {estimator.model_name} on {estimator.device}; registered objects: {names}")
        return result

    @_aloud
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop estimating, and free the model."""
        self._end_session()
        self._outputs[topics.MARKERS].publish(messages.no_markers())
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Take down publishers and subscriptions."""
        result = super().on_cleanup(state)
        self._take_down()
        return result

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """From any state: as deactivate and cleanup."""
        if self._session is not None:
            self.on_deactivate(state)
        self._take_down()
        self._finished = True
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After a transition that raised: back to unconfigured."""
        self._end_session()
        self._take_down()
        return TransitionCallbackReturn.SUCCESS

    def finish(self) -> None:
        """Shut down, unless a lifecycle manager has done so."""
        self.destroy_timer(self._timer)
        if not self._finished:
            self.trigger_shutdown()

    def _end_session(self) -> None:
        with self._registry:  # from now on no service adds anything to it
            session, self._session = self._session, None
        if session is not None:
            session.stop.set()
            session.worker.join()
        self._marked = frozenset()
        with self._registry:
            stream = self._stream
            if stream is not None:
                self._complain(f"the walk round '{stream.object_id}' is given up: the node is no longer active")
                self._cancel_stream(stream)
            for object_id in list(self._objects):
                self._remove(object_id)
        if self._imu_input is not None:
            self._retire(self.destroy_subscription, self._imu_input)
        self._imu = self._imu_input = None
        self._use_parameters([])
        self._pairing.clear()
        self._heard.clear()
        self._meter, self._trouble = Meter(), ""
        del session
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _take_down(self) -> None:
        for publisher in self._outputs.values():
            self._retire(self.destroy_publisher, publisher)
        for subscription in self._inputs.values():
            self._retire(self.destroy_subscription, subscription)
        self._outputs.clear()
        self._inputs.clear()

    def _retire(self, destroy: Callable[[Any], object], entity: Any) -> None:
        self._retired.append(partial(destroy, entity))

    def tidy(self) -> None:
        """Destroy what is out of use. For the thread that spins, between two spins.

        rclpy's executor raises if another thread destroys what it is about to wait for.
        """
        while self._retired:
            self._retired.popleft()()

    def _publisher(self, endpoint: topics.Endpoint) -> Publisher[Any]:
        options = _overridable()
        return self.create_publisher(endpoint.type, endpoint.name, topics.output_qos(), qos_overriding_options=options)

    def _listen(self, type_: type, topic: str, callback: Callable[[Any], None]) -> Any:
        return self.create_subscription(
            type_,
            topic,
            callback,
            topics.input_qos(),
            # Of its own: rclpy's executor tries again and again what has to wait for others of its group.
            callback_group=MutuallyExclusiveCallbackGroup(),
            qos_overriding_options=_overridable(),
        )

    def _serve(self, endpoint: topics.Endpoint, answer: Callable[[Any, Any], Any], group: CallbackGroup) -> None:
        def guarded(request: Any, response: Any) -> Any:
            try:
                return answer(request, response)
            except Exception as error:  # not foreseen; it must not take the node and its objects down
                self.unforeseen(error)
                if hasattr(response, "success"):
                    response.success = False
                    response.message = f"unforeseen {type(error).__name__}: {error}; the node's log has more"
                return response

        qos = topics.service_qos()
        self.create_service(endpoint.type, endpoint.name, guarded, qos_profile=qos, callback_group=group)

    def unforeseen(self, error: Exception) -> None:
        """Tell of a mistake of ours, once with where it happened."""
        self._complain(f"unforeseen {type(error).__name__}: {error}\n{traceback.format_exc()}")

    # --- parameters -------------------------------------------------------------------------------------------------

    def _check_parameters(self, changed: Sequence[Parameter[Any]]) -> Any:
        session = self._session
        result = parameters.check(changed, active=session is not None)
        if result.successful and session is not None:
            for parameter in changed:
                if parameter.name == "refinement":
                    try:  # loaded now, so that no frame waits for it, or refused
                        session.estimator.refinement = parameter.value
                    except InputError as error:
                        result.successful, result.reason = False, f"refinement: {error}"
        return result

    def _use_parameters(self, _: Sequence[Parameter[Any]]) -> None:
        settings = self._settings = parameters.read(self)
        self._pairing.patience = int(settings.mask_patience * 1e9)
        self._pairing.capacity = settings.buffer_megabytes * 1_000_000
        if self._transforms is None and settings.needs_transforms:
            self._transforms = tf.listen(self, history(self._settings))
        if isinstance(self._transforms, distro.TransformTree):
            self._transforms.history = history(self._settings)
        if self._imu is not None:
            self._imu.history = history(self._settings)
        self._gravity = Gravity.of(
            settings, imu=self._imu, transforms=self._transforms, timeout=settings.gravity_timeout
        )

    # --- inputs -----------------------------------------------------------------------------------------------------

    def _receive(self, kind: Kind, message: Any) -> None:
        if self._session is None and kind != "camera_info":  # which some drivers send once
            return
        self._heard[kind] = time.monotonic()
        try:
            stamp = messages.checked_stamp(kind, message.header)
        except InputError as error:
            self._complain(error)
            return
        self._pairing.add(kind, stamp, message, 0 if kind == "camera_info" else len(message.data))

    def _receive_imu(self, message: Imu) -> None:
        imu = self._imu  # deactivation takes it away at any time
        if imu is not None:
            imu.add(ImuSample.of(message))

    # --- the worker -------------------------------------------------------------------------------------------------

    def _work(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                received = self._pairing.take(timeout=0.2)
                if received is not None:
                    self._process(received)
        except BaseException as error:
            self.failure = error  # raised again by the main thread: a node that is deaf must not look alive
            raise

    def _process(self, received: FrameMessages) -> None:
        session, settings = self._session, self._settings
        if session is None:
            return
        begin = time.perf_counter()
        use_threads(settings.threads)
        stream = self._stream
        objects = list(self._objects.values())
        try:
            if settings.fixed_frame != self._tracked_in:  # belief is of the frame it was gathered in
                session.tracker.reset()
                self._tracked_in = settings.fixed_frame
            looked = stream is not None and stream.look(received, self._gravity, rectified=settings.rectified)
            if stream is not None and looked and self._wanted(topics.PROGRESS):
                self._outputs[topics.PROGRESS].publish(stream.progress("collecting frames"))
            with timed() as seconds:
                result = estimate(
                    received, objects, session.estimator, settings, self._gravity, self._complain, session.tracker
                )
                outputs = Outputs(result, settings)
                with stage("publish"):
                    self._publish(outputs)
        except (InputError, torch.cuda.OutOfMemoryError) as error:
            self._complain(error)
            return
        except Exception as error:  # one frame is not worth the node
            self.unforeseen(error)
            return
        age = self.get_clock().now().nanoseconds - received.stamp
        self._times.add(FrameTimes(time.perf_counter() - begin, age / 1e9, seconds))
        for one in outputs.result.seen:
            object_id = one.registered.object_id
            if object_id in self._objects:  # it may have been unregistered meanwhile
                self._sightings[object_id] = health.sighting(outputs, one)

    # --- outputs ----------------------------------------------------------------------------------------------------

    def _publish(self, outputs: Outputs) -> None:
        transforms = outputs.transforms(self._complain)
        if transforms:
            self._broadcaster.sendTransform(transforms)
        for object_id, pose in outputs.object_poses():
            with self._registry:  # an object may be unregistered at any time, its publisher with it
                publisher = self._pose_publishers.get(object_id)
                if publisher is not None:
                    publisher.publish(pose)
        self._outputs[topics.POSES].publish(outputs.poses())
        self._outputs[topics.DETECTIONS].publish(outputs.detections())
        if self._wanted(topics.DISTRIBUTION):
            for distribution in outputs.distributions():
                self._outputs[topics.DISTRIBUTION].publish(distribution)
        if self._wanted(topics.MARKERS):
            self._outputs[topics.MARKERS].publish(outputs.markers(self._marked))
            self._marked = outputs.present
        if self._wanted(topics.OVERLAY):
            self._outputs[topics.OVERLAY].publish(outputs.overlay())

    def _wanted(self, endpoint: topics.Endpoint) -> bool:
        return self._outputs[endpoint].get_subscription_count() > 0

    # --- objects ----------------------------------------------------------------------------------------------------

    def _check_name(self, object_id: str, overwrite: bool) -> None:
        """Whether an object may be registered under a name, as things are now."""
        check_object_id(object_id)
        topic = topics.object_topic(object_id)
        for other in self._objects:
            if other != object_id and topics.object_topic(other) == topic:
                raise InputError(
                    f"object_id: '{object_id}' would publish on the topic of '{other}'; choose another name"
                )
        if object_id in self._objects and not overwrite:
            raise InputError(f"object_id: '{object_id}' is registered already; set overwrite to replace it")

    def _add(self, registered: RegisteredObject, overwrite: bool) -> None:
        with self._registry:
            object_id = registered.object_id
            self._check_name(object_id, overwrite)
            topic = topics.object_topic(object_id)
            if object_id not in self._pose_publishers:
                # Not overridable: that would declare parameters, and here, in a service's thread, rclpy may just be
                # going through them to list them.
                publisher = self.create_publisher(topics.OBJECT_POSE.type, topic, topics.output_qos())
                self._pose_publishers[object_id] = publisher
            self._objects = {**self._objects, object_id: registered}
            self._sightings.pop(object_id, None)

    def _remove(self, object_id: str) -> None:
        with self._registry:
            self._objects = {name: one for name, one in self._objects.items() if name != object_id}
            self._sightings.pop(object_id, None)
            self._retire(self.destroy_publisher, self._pose_publishers.pop(object_id))

    def _register(self, request: RegisterObject.Request, response: RegisterObject.Response) -> RegisterObject.Response:
        begin = time.perf_counter()
        try:
            registered, message = self._registered(request)
        except (InputError, torch.cuda.OutOfMemoryError) as error:
            self._complain(f"register_object: {error}")
            response.message = str(error)
        else:
            response.success, response.message = True, message
            response.template_count = registered.template_count
            self.get_logger().info(message)
        response.duration = time.perf_counter() - begin
        return response

    def _registered(self, request: RegisterObject.Request) -> tuple[RegisteredObject, str]:
        session = self._active()
        object_id = request.object_id
        self._check_name(object_id, request.overwrite)
        settings = self._settings
        use_threads(settings.threads)
        age = 0.0
        if request.mesh_file:
            registered = register_mesh(session.estimator, request, settings.mesh_directory)
        else:
            received = requested_messages(request, self._pairing.latest())
            age = time.monotonic() - received.came
            registered = register(session.estimator, request, received, self._gravity, rectified=settings.rectified)
        note = "" if registered.metric else "; its distance is unknown and is the unit of length"
        note += "" if registered.gravity_known else "; without gravity, so any orientation is possible"
        note += f"; from a frame of {age:.0f} s ago" if age > _FRESH else ""
        note += self._keep(registered, session, request.overwrite)
        return registered, f"Registered '{object_id}': {registered.template_count} templates{note}"

    def _keep(self, registered: RegisteredObject, session: Session, overwrite: bool) -> str:
        """Look for an object from now on, and write it down; what went wrong with the latter, or ''."""
        with self._registry:
            if self._session is not session:
                raise InputError("the node was deactivated meanwhile; activate it and register again")
            self._add(registered, overwrite)  # another call may have taken the name meanwhile
            try:
                aside = session.store.save(registered, overwrite)
            except StoreError as error:
                self._complain(error)
                return f"; {error}"
        return "" if aside is None else f"; a file of that name that could not be loaded is now {aside.name}"

    def _register_stream(
        self, request: RegisterFromStream.Request, response: RegisterFromStream.Response
    ) -> RegisterFromStream.Response:
        begin = time.perf_counter()
        stream = self._stream
        try:
            session = self._active()
            if request.command not in (request.START, request.STOP, request.CANCEL):
                raise InputError(f"command: {request.command} is unknown; 0 starts, 1 stops, 2 cancels")
            if request.command == request.START:
                response.message = self._start_stream(request, session)
            elif stream is None:
                raise InputError("no walk has been started; call with START, go round the object, then STOP")
            elif request.command == request.STOP:
                response.keyframes, response.message = self._stop_stream(stream, session)
            else:
                response.message = self._cancel_stream(stream)
        except (InputError, torch.cuda.OutOfMemoryError) as error:
            self._complain(f"register_from_stream: {error}")
            response.message = str(error)
            if stream is not None and stream is self._stream and request.command == request.STOP:
                response.message += "; the walk goes on: STOP again, or CANCEL"
                self._tell(stream, "failed")
        else:
            response.success = True
        if stream is not None:
            response.frames, response.refused = len(stream.walk), len(stream.walk.refused)
        response.duration = time.perf_counter() - begin
        return response

    def _start_stream(self, request: RegisterFromStream.Request, session: Session) -> str:
        object_id = request.object_id
        if self._stream is not None:
            raise InputError(f"a walk round '{self._stream.object_id}' is under way; STOP or CANCEL it first")
        self._check_name(object_id, request.overwrite)
        distance = request.reference_distance
        if not (np.isfinite(distance) and distance >= 0):
            raise InputError(
                f"reference_distance: {distance:g} is not a distance; give metres, or 0 if it is not known"
            )
        check_count(request.keyframes or KEYFRAMES)
        if request.fixed_frame and self._transforms is None:
            self._transforms = tf.listen(self, history(self._settings))
        transforms = self._transforms if request.fixed_frame else None
        with self._registry:
            if self._session is not session:
                raise InputError("the node was deactivated meanwhile; activate it and start again")
            self._stream = StreamRegistration(request, session.estimator.predictor.crop_size, transforms)
        return f"Collecting frames of '{object_id}': go round it, then STOP"

    def _stop_stream(self, stream: StreamRegistration, session: Session) -> tuple[int, str]:
        """Register the object; how many keyframes it has, and what to answer."""
        use_threads(self._settings.threads)
        try:
            registered = stream.register(session.estimator, partial(self._tell, stream))
            note = self._keep(registered, session, stream.overwrite)
        except Exception:
            stream.go_on()  # minutes of walking are not thrown away
            raise
        keyframes = registered.keyframes
        assert keyframes is not None
        self._stream = None
        told = summary(keyframes)[len(keyframes.refused) :]
        message = f"Registered '{stream.object_id}': {'; '.join(told)}{note}"
        self.get_logger().info(message)
        self._tell(stream, "done")
        return len(keyframes.names), message

    def _cancel_stream(self, stream: StreamRegistration) -> str:
        self._stream = None
        stream.end()
        self._tell(stream, "cancelled")
        return f"Forgot the walk round '{stream.object_id}'"

    def _tell(self, stream: StreamRegistration, stage: str) -> None:
        publisher = self._outputs.get(topics.PROGRESS)
        if publisher is not None:
            publisher.publish(stream.progress(stage))

    def _active(self) -> Session:
        if self._session is None:
            raise InputError("the node is not active; activate it first")
        return self._session

    def _unregister(
        self, request: UnregisterObject.Request, response: UnregisterObject.Response
    ) -> UnregisterObject.Response:
        try:
            session = self._active()
            with self._registry:
                if request.object_id not in self._objects:
                    known = ", ".join(self._objects) or "none"
                    raise InputError(f"object_id: '{request.object_id[:64]}' is not registered; registered: {known}")
                session.store.delete(request.object_id)
                self._remove(request.object_id)
        except InputError as error:
            self._complain(f"unregister_object: {error}")
            response.message = str(error)
        else:
            response.success, response.message = True, f"Unregistered '{request.object_id}'"
        return response

    def _list(self, _: ListObjects.Request, response: ListObjects.Response) -> ListObjects.Response:
        objects = [one for _, one in sorted(self._objects.items())]
        response.object_ids = [one.object_id for one in objects]
        response.metric = [one.metric for one in objects]
        response.template_counts = [one.template_count for one in objects]
        response.reference_distances = [one.reference.distance if one.metric else 0.0 for one in objects]
        response.gravity_known = [one.gravity_known for one in objects]
        return response

    # --- diagnostics ------------------------------------------------------------------------------------------------

    def _problem(self, session: Session | None, rates: Rates) -> tuple[str, bool]:
        """What is wrong and what to do about it, or ''; whether no pose comes out because of it."""
        if session is None:
            if self._finished:
                return "shut down by a lifecycle manager; start the process anew", False
            name = self.get_fully_qualified_name()
            how = f"`ros2 lifecycle set {name} configure`, then `activate`, or the parameter autostart"
            return f"not active: {self._refused or 'nobody has activated it'}; {how}", False
        now = time.monotonic()
        waited: dict[Kind, health.Input] = {}
        for kind, subscription in list(self._inputs.items()):
            silent = now - max(self._heard.get(kind, 0.0), session.began)
            if kind == "camera_info" and self._pairing.calibrated:
                silent = 0.0  # some drivers send it once
            if kind != "depth":
                waited[kind] = health.Input(subscription.topic_name, silent)
        trouble = health.trouble(waited, rates, self._times.newest, self._settings)
        if trouble and not self._trouble:
            self._complain(trouble)
        elif self._trouble and not trouble:
            self.get_logger().info("Inputs are well again")
        self._trouble = trouble
        if trouble:
            return trouble, rates.frames == 0
        last = self._complain.last
        return (last[0] if last is not None and now - last[1] < _REMEMBERED else ""), False

    def _diagnose(self) -> None:
        session, counts = self._session, self._pairing.counts
        rates = self._meter.rates(time.monotonic(), counts)
        device = session.estimator.device if session is not None else "none"
        gpu = {}
        if session is not None and device.startswith("cuda"):
            gpu = {"GPU memory (MB)": f"{torch.cuda.memory_allocated(device) / 1e6:.0f}"}
        problem, silent = self._problem(session, rates)
        now = self.get_clock().now()
        state = Health(
            name=self.get_fully_qualified_name(),
            active=session is not None,
            now=now.nanoseconds,
            model=session.estimator.model_name if session is not None else "none",
            device=device,
            gravity=self._gravity.source,
            objects={object_id: self._sightings.get(object_id) for object_id in self._objects},
            counts=counts,
            rates=rates,
            times=self._times.percentiles(),
            problem=problem,
            silent=silent,
            more={
                "waiting (MB)": f"{self._pairing.held_bytes / 1e6:.1f}",
                "problems": self._complain.total,
                "memory (MB)": f"{health.memory_megabytes():.0f}",
                **gpu,
                **{f"{package} from": provider for package, provider in distro.providers().items()},
            },
        )
        message = DiagnosticArray(status=[health.diagnostic(state)])
        message.header.stamp = now.to_msg()
        self._diagnostics.publish(message)
        text = health.text(state)
        if text != self._said:
            self._said = text
            self._status.publish(String(data=text))


def _overridable() -> QoSOverridingOptions:
    kinds = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
    return QoSOverridingOptions(kinds)


def main(arguments: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM. Returns the exit code."""
    stop = stop_signal()
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = NopeNode()
    except ParameterException as error:
        hint = "; write a number with a point, as 1.0" if "expecting type 'DOUBLE" in str(error) else ""
        rclpy.logging.get_logger("nope").fatal(f"{error}{hint}")
        rclpy.shutdown()
        return 1
    executor = PatientExecutor(num_threads=_THREADS)
    executor.add_node(node)
    if node.get_parameter("autostart").value:
        node.start()
    try:
        while not stop.is_set():
            try:
                executor.spin_once(timeout_sec=0.2)
            except Exception as error:  # of rclpy's own services, or not foreseen; objects must not be lost by it
                node.unforeseen(error)
            node.tidy()
            if node.failure is not None:
                raise node.failure
    finally:
        node.finish()
        # rclpy's shutdown does not wait for callbacks that it has just handed to a thread, and then they complain.
        time.sleep(0.1)
        node.tidy()
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
