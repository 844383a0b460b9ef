#!/bin/bash
# Installing on a cluster without internet: a folder of wheels, made where there is a network, checked and installed where not.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: wheelhouse.sh make FOLDER [--python PYTHON] [--extras LIST] [--glibc 2.N]
       wheelhouse.sh install FOLDER VENV [--python PYTHON]

make     Where there is a network, from a checkout: fills FOLDER with the wheels of brainscale, its extras and all they need,
         as pinned in constraints.txt; builds DeepSpeed's, which is published as source alone. The same command continues
         an interrupted one. SHA256SUMS, written last, names every file.
install  On the cluster: compares every file with SHA256SUMS, then installs into VENV (made if it is not there) from
         FOLDER alone. Uses no network and no settings of pip.

--python PYTHON  a Python of the cluster's version, 3.11 or 3.12 (make: python3; install: the version that FOLDER is for)
--extras LIST    of setup.py (gpu,dali; "" for none)
--glibc 2.N      the cluster's glibc, as `ldd --version` says there (2.28; older ones lack wheels)

Make the folder on Linux with the cluster's processor type. Where pip finds them, torch and what it needs for CUDA are included
(about 3 GB, and 7 GB when installed).

example: slurm/wheelhouse.sh make wheels --python python3.12        # then copy wheels/ and the checkout to the cluster
         slurm/wheelhouse.sh install wheels .venv
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' || fail "$1 does not run; name another --python"; }

make_folder() {
  local root version pip minor wheel glibc_minor=${GLIBC#2.}
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  [[ -f $root/constraints.txt ]] || fail "no constraints.txt in $root; run this script in a checkout of brainscale"
  [[ $GLIBC =~ ^2\.[0-9]+$ ]] || fail "--glibc $GLIBC is no version like 2.28"
  [[ ! -e $FOLDER/SHA256SUMS ]] || fail "$FOLDER is already finished; name another folder, or remove it"
  version=$(version_of "$PYTHON")
  [[ $version == 3.11 || $version == 3.12 ]] || fail "$PYTHON is Python $version; constraints.txt is for 3.11 and 3.12"
  mkdir -p "$FOLDER"
  FOLDER=$(cd "$FOLDER" && pwd)
  WORK=$(mktemp -d) # not local: the trap reads it after this function
  trap 'rm -rf "$WORK"' EXIT
  "$PYTHON" -m venv "$WORK/venv"
  pip=("$WORK/venv/bin/python" -m pip --disable-pip-version-check)

  echo "wheels of brainscale and DeepSpeed"
  rm -f "$FOLDER"/brainscale_mri-*.whl
  # a copy: building in the checkout would take along what an earlier build left there
  (cd "$root" && cp -r setup.py pyproject.toml README.md LICENSE brainscale kernels data_prep slurm "$WORK")
  "${pip[@]}" wheel -q --no-deps --wheel-dir "$FOLDER" "$WORK"
  DS_BUILD_OPS=0 "${pip[@]}" wheel -q --no-deps --wheel-dir "$FOLDER" "$(grep '^deepspeed==' "$root/constraints.txt")"
  wheel=$(basename "$FOLDER"/brainscale_mri-*.whl)
  wheel=${wheel#brainscale_mri-}

  echo "all others, for Python $version and glibc $GLIBC"
  local platforms=(--platform "linux_$(uname -m)" --platform "manylinux2014_$(uname -m)")
  for tag in manylinux1 manylinux2010; do platforms+=(--platform "${tag}_$(uname -m)"); done
  for ((minor = 5; minor <= glibc_minor; minor++)); do platforms+=(--platform "manylinux_2_${minor}_$(uname -m)"); done
  echo "brainscale-mri${EXTRAS:+[$EXTRAS]}==${wheel%%-*}" >"$FOLDER/requirements.txt"
  cp "$root/constraints.txt" "$FOLDER"
  "${pip[@]}" download -q --dest "$FOLDER" --find-links "$FOLDER" -c "$root/constraints.txt" -r "$FOLDER/requirements.txt" \
    --only-binary :all: --python-version "$version" "${platforms[@]}"
  echo "$version" >"$FOLDER/python-version"
  (cd "$FOLDER" && sha256sum -- *.whl requirements.txt constraints.txt python-version >"$WORK/sums")
  mv "$WORK/sums" "$FOLDER/SHA256SUMS"
  echo "$FOLDER: $(find "$FOLDER" -name '*.whl' | wc -l) wheels, $(du -sh "$FOLDER" | cut -f1)"
}

install_folder() {
  local version
  [[ -e $FOLDER/SHA256SUMS ]] || fail "no SHA256SUMS in $FOLDER: it was not finished, or not copied whole"
  echo "comparing $(wc -l <"$FOLDER/SHA256SUMS") files with SHA256SUMS"
  (cd "$FOLDER" && sha256sum --check --strict --quiet SHA256SUMS) || fail "$FOLDER was changed or damaged; copy it again"
  (cd "$FOLDER" && for wheel in *.whl; do
    grep -qF "  $wheel" SHA256SUMS || fail "$FOLDER/$wheel is not in SHA256SUMS; remove it"
  done)
  version=$(cat "$FOLDER/python-version")
  PYTHON=${PYTHON:-python$version}
  [[ $(version_of "$PYTHON") == "$version" ]] || fail "$FOLDER is for Python $version, and $PYTHON is not; name another --python"
  "$PYTHON" -m venv "$VENV"
  PIP_CONFIG_FILE=/dev/null "$VENV/bin/python" -m pip --isolated --disable-pip-version-check install -q --no-cache-dir --no-index \
    --find-links "$FOLDER" -c "$FOLDER/constraints.txt" -r "$FOLDER/requirements.txt"
  echo "brainscale $("$VENV/bin/brainscale" --version) in $VENV"
}

COMMAND=${1:-}
case $COMMAND in
-h | --help) usage && exit ;;
make) PLACES=1 PYTHON=python3 ;;
install) PLACES=2 PYTHON='' ;;
*) usage >&2 && exit 2 ;;
esac
shift
EXTRAS=gpu,dali GLIBC=2.28
NAMED=()
while (($#)); do
  case $1 in
  -h | --help) usage && exit ;;
  --python | --extras | --glibc)
    (($# > 1)) || fail "$1 wants a value"
    case $1 in --python) PYTHON=$2 ;; --extras) EXTRAS=$2 ;; --glibc) GLIBC=$2 ;; esac
    shift 2
    ;;
  -*) fail "unknown option $1; see --help" ;;
  *) NAMED+=("$1") && shift ;;
  esac
done
((${#NAMED[@]} == PLACES)) || fail "$COMMAND wants $PLACES name(s), got ${#NAMED[@]}; see --help"
FOLDER=${NAMED[0]}
VENV=${NAMED[1]:-}
"${COMMAND}_folder"
