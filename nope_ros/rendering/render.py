"""A CPU rasteriser: one triangle mesh, one pinhole camera, a handful of directional lights.

Two passes. The first finds the nearest triangle of every sample (z-buffer over 1/z, which is linear in the image). The
second shades only what is visible. A pixel whose samples all fall on one triangle is lit once and textured per sample;
only pixels across edges are lit per sample. Light is added up linearly and encoded as sRGB at the end.

With shadow maps, made once for an object, a surface is lit by what it sees: neither by lights that another part hides,
nor by the part of its surroundings that lies behind one. A plain object in a photograph shows its shape by little else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nope_ros.rendering.mesh import Mesh

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

NEAR = 1e-3
"""Triangles that reach nearer than this (in the mesh's unit) are dropped whole; no camera is inside an object."""


def _srgb_decode() -> Floats:
    """(256,) sRGB byte → linear."""
    c = np.arange(256) / 255.0
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4).astype(np.float32)


_ENCODE_MAX = 3.0
_ENCODE_SIZE = 12288


def _srgb_encode() -> NDArray[np.uint8]:
    """(_ENCODE_SIZE,) linear 0.._ENCODE_MAX → sRGB byte, with a soft shoulder as cameras have instead of clipping."""
    x = (np.arange(_ENCODE_SIZE) + 0.5) * (_ENCODE_MAX / _ENCODE_SIZE)
    knee = 0.8
    x = np.where(x < knee, x, knee + (1 - knee) * (1 - np.exp(-(x - knee) / (1 - knee))))
    s = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    return np.clip(np.round(255 * s), 0, 255).astype(np.uint8)


_DECODE = _srgb_decode()
_ENCODE = _srgb_encode()


def _rows(values: object) -> Floats:
    return np.ascontiguousarray(np.asarray(values, np.float32).reshape(-1, 3))


@dataclass(frozen=True)
class ShadowMaps:
    """How far an object reaches towards each of some directions, beside each line of that direction."""

    directions: Floats
    """(N, 3) unit vectors, object axes."""
    reach: Floats
    """(N, S, S) x·direction of what comes nearest to the light; −inf beside the object."""
    centre: Doubles
    """(3,) where the maps' middles look at, object axes."""
    radius: float
    """Half the side of a map, in the mesh's unit."""

    @classmethod
    def of(cls, mesh: Mesh, directions: NDArray[np.floating], size: int) -> ShadowMaps:
        """The maps of ``size`` × ``size`` cells of a mesh for lights in these directions (N, 3), object axes."""
        used = mesh.vertices[np.unique(mesh.faces)].astype(np.float64)
        centre = 0.5 * (used.min(axis=0) + used.max(axis=0))
        radius = 1.02 * float(np.linalg.norm(used - centre, axis=1).max())
        return cls._towards(mesh, directions, size, centre, radius)

    def for_lights(self, mesh: Mesh, directions: NDArray[np.floating], size: int) -> ShadowMaps:
        """Maps of the same mesh for other lights; what does not depend on the lights is not found again."""
        return self._towards(mesh, directions, size, self.centre, self.radius)

    @classmethod
    def _towards(
        cls, mesh: Mesh, directions: NDArray[np.floating], size: int, centre: Doubles, radius: float
    ) -> ShadowMaps:
        towards = _rows(directions)
        towards = towards / np.linalg.norm(towards, axis=1, keepdims=True)
        return cls(towards, _reach(mesh.vertices, mesh.faces, towards, centre, radius, size), centre, radius)


def all_around(count: int) -> Floats:
    """Unit vectors (count, 3), evenly over the sphere: a Fibonacci lattice."""
    z = 1 - (2 * np.arange(count) + 1) / count
    turn = np.arange(count) * np.pi * (3 - np.sqrt(5))
    flat = np.sqrt(1 - z * z)
    return np.stack([flat * np.cos(turn), flat * np.sin(turn), z], axis=-1).astype(np.float32)


@dataclass(frozen=True)
class Lighting:
    """Light and finish of the surface. Colours and strengths are linear: albedo 1 under ambient 1 is white."""

    directions: Floats = field(default_factory=lambda: _rows([[-0.4, -0.7, -0.6]]))
    """(L, 3) unit vectors from the object towards each light, camera axes."""
    colours: Floats = field(default_factory=lambda: _rows([[0.6, 0.6, 0.6]]))
    """(L, 3) strength of each light."""
    ambient_sky: tuple[float, float, float] = (0.45, 0.45, 0.45)
    """Light from all around, at a surface that faces `up`."""
    ambient_ground: tuple[float, float, float] = (0.3, 0.3, 0.3)
    """Same, at a surface that faces away from `up`."""
    up: tuple[float, float, float] = (0.0, -1.0, 0.0)
    """Unit vector, camera axes."""
    specular: float = 0.1
    """Strength of highlights; 0 is matt."""
    shininess: float = 30.0
    """Blinn-Phong exponent."""
    metalness: float = 0.0
    """0: highlights have the light's colour. 1: they have the surface's, and little is scattered."""
    exposure: float = 1.0
    shadows: ShadowMaps | None = None
    """Of the lights, in their order; without, parts of the object do not shade each other."""
    around: ShadowMaps | None = None
    """Directions from which light from all around comes, as far as it is not hidden; without, nothing is."""
    patches: Floats | None = None
    """(N,) how bright the surroundings are in each of the directions of ``around``, times what sky and ground say; None
    is 1."""

    def __post_init__(self) -> None:
        """Raises ValueError where shadow maps do not belong to the lights: the renderer would read beside them."""
        if self.shadows is not None and len(self.shadows.directions) != len(self.directions):
            raise ValueError(f"{len(self.shadows.directions)} shadow maps for {len(self.directions)} lights")
        if self.patches is not None and (self.around is None or len(self.around.directions) != len(self.patches)):
            raise ValueError("patches need shadow maps around the object, one for each")

    @classmethod
    def uniform(cls) -> Lighting:
        """No lights, no shading: every pixel shows its albedo (up to the shoulder near white)."""
        one = (1.0, 1.0, 1.0)
        empty = np.zeros((0, 3), np.float32)
        return cls(directions=empty, colours=empty, ambient_sky=one, ambient_ground=one, specular=0.0)


@dataclass(frozen=True)
class Rendering:
    """What the camera sees."""

    rgb: NDArray[np.uint8]
    """(H, W, 3) sRGB: over the background, or, where none was given, the object's own colour not multiplied by coverage
    and black where there is no object."""
    mask: NDArray[np.bool_]
    """(H, W): at least half the pixel is covered."""
    depth: Floats
    """(H, W) z of the nearest surface in the mesh's unit; 0 where there is no object."""
    coverage: NDArray[np.uint8]
    """(H, W): covered share of the pixel, 255 is all of it."""


def render(
    mesh: Mesh,
    R_camera_object: NDArray[np.floating],
    t_camera_object: NDArray[np.floating],
    K: NDArray[np.floating],
    width: int,
    height: int,
    *,
    lighting: Lighting | None = None,
    supersampling: int = 2,
    background: NDArray[np.uint8] | None = None,
) -> Rendering:
    """Renders `mesh` with x_camera = R·x_object + t, optical axes (x right, y down, z forward).

    K: (3, 3); the centre of the top left pixel is (0, 0). background: (H, W, 3) or one colour (3,).
    """
    light = lighting or Lighting()
    R = np.ascontiguousarray(R_camera_object, np.float64)
    t = np.ascontiguousarray(t_camera_object, np.float64).reshape(3)
    s = int(supersampling)
    K_samples = np.array(K, np.float64)
    # Sample i of s per pixel sits at u = (i + 0.5) / s − 0.5.
    K_samples[0] *= s
    K_samples[1] *= s
    K_samples[0, 2] += 0.5 * (s - 1)
    K_samples[1, 2] += 0.5 * (s - 1)
    samples = (width * s, height * s)
    camera, inverse_depth, triangle = _rasterise(mesh.vertices, mesh.faces, R, t, K_samples, *samples, NEAR)
    rgb, depth, coverage = _shade(
        camera,
        mesh.faces,
        mesh.normals,
        mesh.uv if mesh.uv is not None and mesh.texture is not None else np.zeros((0, 2), np.float32),
        mesh.texture if mesh.texture is not None and mesh.uv is not None else np.zeros((0, 0, 3), np.uint8),
        mesh.colours if mesh.colours is not None else np.zeros((0, 3), np.uint8),
        R,
        np.ascontiguousarray(np.linalg.inv(K_samples), np.float64),
        inverse_depth,
        triangle,
        s,
        _rows(light.directions),
        _rows(light.colours),
        np.asarray(light.ambient_sky, np.float64),
        np.asarray(light.ambient_ground, np.float64),
        np.asarray(light.up, np.float64),
        float(light.specular),
        float(light.shininess),
        float(light.metalness),
        float(light.exposure),
        _DECODE,
        _ENCODE,
        mesh.vertices,
        *_maps(light.shadows),
        *_maps(light.around),
        _patches(light),
    )
    if background is not None:
        behind = np.broadcast_to(np.asarray(background, np.uint8), rgb.shape).astype(np.float32)
        alpha = coverage[..., None].astype(np.float32) / 255
        rgb = np.round(rgb * alpha + behind * (1 - alpha)).astype(np.uint8)
    return Rendering(rgb=rgb, mask=coverage >= 128, depth=depth, coverage=coverage)


def _maps(maps: ShadowMaps | None) -> tuple[Floats, Floats, Doubles, float]:
    if maps is None:
        return np.zeros((0, 3), np.float32), np.zeros((0, 1, 1), np.float32), np.zeros(3), 1.0
    return maps.directions, maps.reach, maps.centre, maps.radius


def _patches(light: Lighting) -> Floats:
    if light.patches is None:
        return np.ones(0 if light.around is None else len(light.around.directions), np.float32)
    return np.ascontiguousarray(light.patches, np.float32)


@njit(cache=True, nogil=True)
def _across(direction: Floats) -> tuple[float, float, float, float, float, float]:
    """Two unit vectors that stand upright on a direction and on each other (Duff et al., JCGT 2017)."""
    x, y, z = np.float64(direction[0]), np.float64(direction[1]), np.float64(direction[2])
    sign = 1.0 if z >= 0 else -1.0
    a = -1.0 / (sign + z)
    b = x * y * a
    return 1.0 + sign * x * x * a, sign * b, -sign * x, b, sign + y * y * a, -y


@njit(cache=True, nogil=True)
def _reach(
    vertices: Floats, faces: NDArray[np.int32], directions: Floats, centre: Doubles, radius: float, size: int
) -> Floats:
    """``ShadowMaps.reach``: a z-buffer without perspective for each direction."""
    maps = np.full((directions.shape[0], size, size), -np.inf, np.float32)
    seen = np.empty((vertices.shape[0], 3), np.float64)
    to_cells = 0.5 * size / radius
    for n in range(directions.shape[0]):
        ux, uy, uz, vx, vy, vz = _across(directions[n])
        dx, dy, dz = directions[n, 0], directions[n, 1], directions[n, 2]
        for i in range(vertices.shape[0]):
            x, y, z = vertices[i, 0] - centre[0], vertices[i, 1] - centre[1], vertices[i, 2] - centre[2]
            seen[i, 0] = (ux * x + uy * y + uz * z + radius) * to_cells - 0.5
            seen[i, 1] = (vx * x + vy * y + vz * z + radius) * to_cells - 0.5
            seen[i, 2] = dx * x + dy * y + dz * z
        for f in range(faces.shape[0]):
            a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
            ax, ay, bx, by, cx, cy = seen[a, 0], seen[a, 1], seen[b, 0], seen[b, 1], seen[c, 0], seen[c, 1]
            x0, x1 = max(int(np.ceil(min(ax, bx, cx))), 0), min(int(np.floor(max(ax, bx, cx))), size - 1)
            y0, y1 = max(int(np.ceil(min(ay, by, cy))), 0), min(int(np.floor(max(ay, by, cy))), size - 1)
            area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
            if x1 < x0 or y1 < y0 or abs(area) < 1e-12:
                continue
            for y in range(y0, y1 + 1):
                for x in range(x0, x1 + 1):
                    wa = ((bx - x) * (cy - y) - (by - y) * (cx - x)) / area
                    wb = ((cx - x) * (ay - y) - (cy - y) * (ax - x)) / area
                    wc = 1.0 - wa - wb
                    if wa >= -1e-9 and wb >= -1e-9 and wc >= -1e-9:
                        near = np.float32(wa * seen[a, 2] + wb * seen[b, 2] + wc * seen[c, 2])
                        maps[n, y, x] = max(maps[n, y, x], near)
    return maps


@njit(cache=True, nogil=True)
def _lit(reach: Floats, direction: Floats, centre: Doubles, radius: float, x: float, y: float, z: float) -> float:
    """How much of a light reaches a point, 0..1: the map's four nearest cells, each of which hides it or does not."""
    size = reach.shape[0]
    ux, uy, uz, vx, vy, vz = _across(direction)
    x, y, z = x - centre[0], y - centre[1], z - centre[2]
    to_cells = 0.5 * size / radius
    u = (ux * x + uy * y + uz * z + radius) * to_cells - 0.5
    v = (vx * x + vy * y + vz * z + radius) * to_cells - 0.5
    near = direction[0] * x + direction[1] * y + direction[2] * z
    u0, v0 = int(np.floor(u)), int(np.floor(v))
    if u0 < 0 or v0 < 0 or u0 + 1 >= size or v0 + 1 >= size:
        return 1.0
    fu, fv = u - u0, v - v0
    lit = 0.0
    if near >= reach[v0, u0]:
        lit += (1 - fu) * (1 - fv)
    if near >= reach[v0, u0 + 1]:
        lit += fu * (1 - fv)
    if near >= reach[v0 + 1, u0]:
        lit += (1 - fu) * fv
    if near >= reach[v0 + 1, u0 + 1]:
        lit += fu * fv
    return lit


@njit(cache=True, nogil=True)
def _rasterise(
    vertices: Floats,
    faces: NDArray[np.int32],
    R: Doubles,
    t: Doubles,
    K: Doubles,
    width: int,
    height: int,
    near: float,
) -> tuple[Doubles, Floats, NDArray[np.int32]]:
    """Vertices in the camera (V, 3), and for each sample 1/z (0: nothing) and the triangle's index (−1: none)."""
    count = vertices.shape[0]
    camera = np.empty((count, 3), np.float64)
    image = np.empty((count, 2), np.float64)
    for i in range(count):
        x, y, z = vertices[i, 0], vertices[i, 1], vertices[i, 2]
        X = R[0, 0] * x + R[0, 1] * y + R[0, 2] * z + t[0]
        Y = R[1, 0] * x + R[1, 1] * y + R[1, 2] * z + t[1]
        Z = R[2, 0] * x + R[2, 1] * y + R[2, 2] * z + t[2]
        camera[i, 0], camera[i, 1], camera[i, 2] = X, Y, Z
        if near <= Z:
            image[i, 0] = (K[0, 0] * X + K[0, 1] * Y) / Z + K[0, 2]
            image[i, 1] = K[1, 1] * Y / Z + K[1, 2]
    inverse_depth = np.zeros((height, width), np.float32)
    triangle = np.full((height, width), -1, np.int32)
    for f in range(faces.shape[0]):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        if camera[a, 2] < near or camera[b, 2] < near or camera[c, 2] < near:
            continue
        ax, ay, bx, by, cx, cy = image[a, 0], image[a, 1], image[b, 0], image[b, 1], image[c, 0], image[c, 1]
        x0 = max(int(np.ceil(min(ax, bx, cx))), 0)
        x1 = min(int(np.floor(max(ax, bx, cx))), width - 1)
        y0 = max(int(np.ceil(min(ay, by, cy))), 0)
        y1 = min(int(np.floor(max(ay, by, cy))), height - 1)
        if x1 < x0 or y1 < y0:
            continue
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if abs(area) < 1e-12:
            continue
        # Barycentric weights are linear in the image: value at (x0, y0), and steps along x and y.
        wax, way = (by - cy) / area, (cx - bx) / area
        wbx, wby = (cy - ay) / area, (ax - cx) / area
        wa0 = 1.0 + (x0 - ax) * wax + (y0 - ay) * way
        wb0 = (x0 - ax) * wbx + (y0 - ay) * wby
        ia, ib, ic = 1.0 / camera[a, 2], 1.0 / camera[b, 2], 1.0 / camera[c, 2]
        for y in range(y0, y1 + 1):
            wa, wb = wa0, wb0
            for x in range(x0, x1 + 1):
                wc = 1.0 - wa - wb
                if wa >= -1e-9 and wb >= -1e-9 and wc >= -1e-9:
                    depth = np.float32(wa * ia + wb * ib + wc * ic)
                    if depth > inverse_depth[y, x]:
                        inverse_depth[y, x] = depth
                        triangle[y, x] = f
                wa += wax
                wb += wbx
            wa0 += way
            wb0 += wby
    return camera, inverse_depth, triangle


@njit(cache=True, nogil=True, inline="always")
def _weights(camera: Doubles, a: int, b: int, c: int, rx: float, ry: float) -> tuple[float, float, float]:
    """Barycentric weights where the ray (rx, ry, 1) meets the plane of a triangle: signed volumes of ray and edges."""
    ax, ay, az = camera[a, 0], camera[a, 1], camera[a, 2]
    bx, by, bz = camera[b, 0], camera[b, 1], camera[b, 2]
    cx, cy, cz = camera[c, 0], camera[c, 1], camera[c, 2]
    wa = rx * (by * cz - bz * cy) + ry * (bz * cx - bx * cz) + (bx * cy - by * cx)
    wb = rx * (cy * az - cz * ay) + ry * (cz * ax - cx * az) + (cx * ay - cy * ax)
    wc = rx * (ay * bz - az * by) + ry * (az * bx - ax * bz) + (ax * by - ay * bx)
    total = wa + wb + wc
    if abs(total) < 1e-30:
        return 1.0 / 3, 1.0 / 3, 1.0 / 3
    return wa / total, wb / total, wc / total


@njit(cache=True, nogil=True)
def _shade(
    camera: Doubles,
    faces: NDArray[np.int32],
    normals: Floats,
    uv: Floats,
    texture: NDArray[np.uint8],
    colours: NDArray[np.uint8],
    R: Doubles,
    K_inv: Doubles,
    inverse_depth: Floats,
    triangle: NDArray[np.int32],
    s: int,
    directions: Floats,
    strengths: Floats,
    sky: Doubles,
    ground: Doubles,
    up: Doubles,
    specular: float,
    shininess: float,
    metalness: float,
    exposure: float,
    decode: Floats,
    encode: NDArray[np.uint8],
    vertices: Floats,
    shadow_directions: Floats,
    shadow_reach: Floats,
    shadow_centre: Doubles,
    shadow_radius: float,
    around_directions: Floats,
    around_reach: Floats,
    around_centre: Doubles,
    around_radius: float,
    patches: Floats,
) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8]]:
    """Colours, depths and coverage of the pixels from s × s samples each."""
    height, width = inverse_depth.shape[0] // s, inverse_depth.shape[1] // s
    rgb = np.zeros((height, width, 3), np.uint8)
    depth = np.zeros((height, width), np.float32)
    coverage = np.zeros((height, width), np.uint8)
    textured, coloured = texture.shape[0] > 0, colours.shape[0] > 0
    th, tw = texture.shape[0], texture.shape[1]
    lights = directions.shape[0]
    shadowed, patched = shadow_directions.shape[0] > 0, around_directions.shape[0]
    # A point is asked for one and a half cells above its surface, or the surface would hide itself.
    above_shadow = 3.0 * shadow_radius / shadow_reach.shape[1]
    above_around = 3.0 * around_radius / around_reach.shape[1]
    surroundings, around_axes = np.empty((patched, 3)), np.empty((patched, 9))
    around_size, half = around_reach.shape[1], 0.5 * around_reach.shape[1]
    for n in range(patched):
        around_axes[n, :3] = around_directions[n]
        axes = _across(around_directions[n])
        for k in range(6):
            around_axes[n, 3 + k] = axes[k] * half / around_radius
        dx, dy, dz = around_directions[n, 0], around_directions[n, 1], around_directions[n, 2]
        upward = up[0] * (R[0, 0] * dx + R[0, 1] * dy + R[0, 2] * dz)
        upward += up[1] * (R[1, 0] * dx + R[1, 1] * dy + R[1, 2] * dz)
        upward += up[2] * (R[2, 0] * dx + R[2, 1] * dy + R[2, 2] * dz)
        for k in range(3):  # the mean of a cosine over the sphere is a quarter
            level = ground[k] + (sky[k] - ground[k]) * min(max(0.5 + 0.75 * upward, 0.0), 1.0)
            surroundings[n, k] = level * patches[n] * 4.0 / patched
    # Below this cosine a highlight is invisible, and the power need not be taken.
    faint = np.exp(np.log(0.004) / max(shininess, 1.0))
    to_code = encode.shape[0] / _ENCODE_MAX
    last_code = encode.shape[0] - 1
    albedo = np.empty(3)
    light = np.empty(3)
    shine = np.empty(3)
    total = np.empty(3)
    for py in range(height):
        for px in range(width):
            covered = 0
            first = -1
            same = True
            nearest = np.float32(0.0)
            for j in range(s):
                for i in range(s):
                    f = triangle[py * s + j, px * s + i]
                    if f >= 0:
                        nearest = max(nearest, inverse_depth[py * s + j, px * s + i])
                        if covered == 0:
                            first = f
                        elif f != first:
                            same = False
                        covered += 1
            if covered == 0:
                continue
            coverage[py, px] = (255 * covered + s * s // 2) // (s * s)
            # 1/z is linear on a plane, so its mean is exact at the centre; samples of other surfaces stay out.
            inverse_sum, inverse_count = 0.0, 0
            for j in range(s):
                for i in range(s):
                    value = inverse_depth[py * s + j, px * s + i]
                    if value > 0.97 * nearest:
                        inverse_sum += value
                        inverse_count += 1
            depth[py, px] = inverse_count / inverse_sum
            total[:] = 0.0
            groups = 1 if same else covered
            done = 0
            for j in range(s):
                for i in range(s):
                    f = triangle[py * s + j, px * s + i]
                    if f < 0 or (same and done == 1):
                        continue
                    done += 1
                    a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
                    if same and covered == s * s:
                        x, y = px * s + 0.5 * (s - 1), py * s + 0.5 * (s - 1)
                    else:
                        x, y = float(px * s + i), float(py * s + j)
                    rx = K_inv[0, 0] * x + K_inv[0, 1] * y + K_inv[0, 2]
                    ry = K_inv[1, 1] * y + K_inv[1, 2]
                    wa, wb, wc = _weights(camera, a, b, c, rx, ry)

                    albedo[:] = 1.0
                    if textured:
                        albedo[:] = 0.0
                        taps = 0
                        for jj in range(s):
                            for ii in range(s):
                                if same:
                                    if triangle[py * s + jj, px * s + ii] != f:
                                        continue
                                    tx = K_inv[0, 0] * (px * s + ii) + K_inv[0, 1] * (py * s + jj) + K_inv[0, 2]
                                    ty = K_inv[1, 1] * (py * s + jj) + K_inv[1, 2]
                                    va, vb, vc = _weights(camera, a, b, c, tx, ty)
                                else:
                                    if taps == 1:
                                        continue
                                    va, vb, vc = wa, wb, wc
                                taps += 1
                                u = (va * uv[a, 0] + vb * uv[b, 0] + vc * uv[c, 0]) * tw - 0.5
                                v = (va * uv[a, 1] + vb * uv[b, 1] + vc * uv[c, 1]) * th - 0.5
                                uf, vf = np.floor(u), np.floor(v)
                                u0, v0 = int(uf) % tw, int(vf) % th
                                u1, v1 = (u0 + 1) % tw, (v0 + 1) % th
                                fu, fv = u - uf, v - vf
                                for k in range(3):
                                    upper = decode[texture[v0, u0, k]] * (1 - fu) + decode[texture[v0, u1, k]] * fu
                                    lower = decode[texture[v1, u0, k]] * (1 - fu) + decode[texture[v1, u1, k]] * fu
                                    albedo[k] += upper * (1 - fv) + lower * fv
                        for k in range(3):
                            albedo[k] /= taps
                    if coloured:
                        for k in range(3):
                            albedo[k] *= (
                                wa * decode[colours[a, k]] + wb * decode[colours[b, k]] + wc * decode[colours[c, k]]
                            )

                    ox = wa * normals[f, 0, 0] + wb * normals[f, 1, 0] + wc * normals[f, 2, 0]
                    oy = wa * normals[f, 0, 1] + wb * normals[f, 1, 1] + wc * normals[f, 2, 1]
                    oz = wa * normals[f, 0, 2] + wb * normals[f, 1, 2] + wc * normals[f, 2, 2]
                    nx = R[0, 0] * ox + R[0, 1] * oy + R[0, 2] * oz
                    ny = R[1, 0] * ox + R[1, 1] * oy + R[1, 2] * oz
                    nz = R[2, 0] * ox + R[2, 1] * oy + R[2, 2] * oz
                    inverse = 1.0 / max(np.sqrt(nx * nx + ny * ny + nz * nz), 1e-12)
                    nx, ny, nz = nx * inverse, ny * inverse, nz * inverse
                    inverse = 1.0 / np.sqrt(rx * rx + ry * ry + 1.0)
                    ex, ey, ez = -rx * inverse, -ry * inverse, -inverse  # towards the eye
                    facing = nx * ex + ny * ey + nz * ez
                    if facing < 0:  # both sides of a face are surface
                        nx, ny, nz, facing = -nx, -ny, -nz, -facing
                    at_x, at_y, at_z = 0.0, 0.0, 0.0
                    if shadowed or patched:
                        at_x = wa * vertices[a, 0] + wb * vertices[b, 0] + wc * vertices[c, 0]
                        at_y = wa * vertices[a, 1] + wb * vertices[b, 1] + wc * vertices[c, 1]
                        at_z = wa * vertices[a, 2] + wb * vertices[b, 2] + wc * vertices[c, 2]
                        ox = R[0, 0] * nx + R[1, 0] * ny + R[2, 0] * nz
                        oy = R[0, 1] * nx + R[1, 1] * ny + R[2, 1] * nz
                        oz = R[0, 2] * nx + R[1, 2] * ny + R[2, 2] * nz

                    upward = 0.5 + 0.5 * (nx * up[0] + ny * up[1] + nz * up[2])
                    for k in range(3):
                        light[k] = 0.0 if patched else ground[k] + (sky[k] - ground[k]) * upward
                        shine[k] = 0.0
                    if patched:
                        at_x0 = at_x + above_around * ox - around_centre[0]
                        at_y0 = at_y + above_around * oy - around_centre[1]
                        at_z0 = at_z + above_around * oz - around_centre[2]
                    for n in range(patched):
                        dx, dy, dz = around_axes[n, 0], around_axes[n, 1], around_axes[n, 2]
                        cosine = ox * dx + oy * dy + oz * dz
                        if cosine <= 0:
                            continue
                        # One cell is enough: what many directions add up to is soft all the same.
                        u = int(
                            around_axes[n, 3] * at_x0 + around_axes[n, 4] * at_y0 + around_axes[n, 5] * at_z0 + half
                        )
                        v = int(
                            around_axes[n, 6] * at_x0 + around_axes[n, 7] * at_y0 + around_axes[n, 8] * at_z0 + half
                        )
                        inside = 0 <= u < around_size and 0 <= v < around_size
                        if not inside or dx * at_x0 + dy * at_y0 + dz * at_z0 >= around_reach[n, v, u]:
                            for k in range(3):
                                light[k] += cosine * surroundings[n, k]
                    for n in range(lights):
                        lx, ly, lz = directions[n, 0], directions[n, 1], directions[n, 2]
                        cosine = nx * lx + ny * ly + nz * lz
                        if cosine <= 0:
                            continue
                        through = 1.0
                        if shadowed:
                            through = _lit(
                                shadow_reach[n],
                                shadow_directions[n],
                                shadow_centre,
                                shadow_radius,
                                at_x + above_shadow * ox,
                                at_y + above_shadow * oy,
                                at_z + above_shadow * oz,
                            )
                            if through <= 0:
                                continue
                        cosine *= through
                        glint = 0.0
                        if specular > 0:
                            hx, hy, hz = lx + ex, ly + ey, lz + ez
                            h = (nx * hx + ny * hy + nz * hz) / max(np.sqrt(hx * hx + hy * hy + hz * hz), 1e-9)
                            if h > faint:
                                glint = specular * h**shininess * through
                        for k in range(3):
                            light[k] += cosine * strengths[n, k]
                            shine[k] += glint * strengths[n, k]
                    if specular > 0:
                        # What surrounds the object is mirrored too, most at grazing angles (Schlick).
                        grazing = 1.0 - facing
                        mirror = specular * (0.15 + 0.85 * grazing**5)
                        reflected = 2 * facing
                        above = (reflected * nx - ex) * up[0] + (reflected * ny - ey) * up[1]
                        above += (reflected * nz - ez) * up[2]
                        above = min(max(0.5 + 2.0 * above, 0.0), 1.0)  # a horizon, not a haze
                        for k in range(3):
                            shine[k] += mirror * (ground[k] + (sky[k] - ground[k]) * above)
                    for k in range(3):
                        tint = 1.0 - metalness + metalness * albedo[k]
                        total[k] += albedo[k] * light[k] * (1.0 - 0.6 * metalness) + tint * shine[k]
            for k in range(3):
                code = int(total[k] / groups * exposure * to_code)
                rgb[py, px, k] = encode[min(max(code, 0), last_code)]
    return rgb, depth, coverage
