#!/bin/sh
# Runs a bundle's IREE modules where this machine is something else: an aarch64 CPU that QEMU emulates, and a Vulkan
# device that Mesa's lavapipe emulates. Each must give the golden tokens; the speed says nothing.
#
#   apt-get install qemu-user mesa-vulkan-drivers libvulkan1
#   llamajax export … --profile=unrolled --target=iree-pi4,iree-vulkan-llvmpipe
#   sh benchmarks/export_elsewhere.sh BUNDLE
#
# For Debian or Ubuntu on x86-64, with python3 and its venv. Everything else is fetched into a temporary folder, which is
# left behind only if something fails; nothing of the system changes, and only the installation above needs root.
set -eu
[ -f "$1/run_iree.py" ] || { echo "$1: no run_iree.py: expected a bundle" >&2; exit 1; }
bundle=$(cd "$1" && pwd)
for tool in qemu-aarch64 dpkg-deb; do
  command -v $tool >/dev/null || { echo "no $tool: install the packages named in this script's head" >&2; exit 1; }
done
work=$(mktemp -d)
cd "$work"

# golden TARGET COMMAND...: prints the runner's JSON; fails unless every golden prompt is continued exactly.
golden() {
  target=$1
  shift
  echo "== $target"
  IREE_TARGET=$target "$@" "$bundle/run_iree.py" --golden | tee golden.json
  ! grep -q '"exact": false' golden.json
  grep -q '"exact": true' golden.json
}

python3 -m venv host
host/bin/pip install --quiet iree-base-runtime

# Python for aarch64, with all libraries that it needs, out of this release's packages. apt gets a state of its own, in
# which nothing is installed, and only fetches; the packages are unpacked, not installed.
mkdir -p apt/lists/partial apt/archives/partial root
cat >apt.conf <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "";
Dir::State "$work/apt";
Dir::State::status "/dev/null";
Dir::Cache "$work/apt";
CONF
APT_CONFIG=$work/apt.conf apt-get update --quiet=2
APT_CONFIG=$work/apt.conf apt-get install --quiet=2 --yes --download-only python3 libstdc++6 >apt.log
for package in apt/archives/*.deb; do dpkg-deb --extract "$package" root; done
[ -e root/lib ] || ln -s usr/lib root/lib
python=$(cd root/usr/bin && ls python3.[0-9]* | head -n 1)

# The wheels for aarch64, of the same version as on this side.
version=$(host/bin/python -c "from importlib.metadata import version; print(version('iree-base-runtime'))")
host/bin/pip download --quiet --only-binary=:all: --python-version="${python#python}" --implementation=cp \
  --platform=manylinux_2_28_aarch64 --platform=manylinux_2_17_aarch64 --platform=manylinux2014_aarch64 \
  --dest=wheels "iree-base-runtime==$version"
for wheel in wheels/*.whl; do python3 -m zipfile -e "$wheel" site; done

golden iree-pi4 qemu-aarch64 -L root -E PYTHONPATH="$work/site" "root/usr/bin/$python"

# Only lavapipe, whatever other drivers there are.
VK_ICD_FILENAMES=$(ls /usr/share/vulkan/icd.d/lvp_icd*.json)
export VK_ICD_FILENAMES
golden iree-vulkan-llvmpipe host/bin/python

cd /
rm -r "$work"
