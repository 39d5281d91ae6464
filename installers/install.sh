#!/bin/sh
# Installs the Palebluedot agent on a GPU server and tells it its controller.
#
#   install.sh --controller HOST:PORT --token-file FILE --ca-fingerprint SHA256 [--package FILE.deb] [--root DIR]
#
# Running it again is safe: it changes only what differs. Exit codes: 0 done, 1 it failed, 2 wrong usage.
set -eu
umask 077

program=${0##*/}

usage() {
  cat <<TEXT
Usage: $program --controller HOST:PORT --token-file FILE --ca-fingerprint SHA256 [options]

  --controller HOST:PORT     enrolment address of the controller (https://HOST:PORT is understood too)
  --token-file FILE          join token as pbd join-token create prints it; copied to a file of mode 0600
  --ca-fingerprint SHA256    of the controller's CA, 64 hexadecimal digits; colons are allowed
  --package FILE.deb         the agent's package (default: palebluedot-agent_*.deb beside this script)
  --root DIR                 install into this directory tree, for host images: nothing is started
  --help
TEXT
}

say() { printf '%s: %s\n' "$program" "$1" >&2; }
fail() { say "$1"; exit 1; }
misuse() {
  say "$1"
  usage >&2
  exit 2
}

controller='' token_file='' fingerprint='' package='' root=''
while [ $# -gt 0 ]; do
  case $1 in
    --controller | --token-file | --ca-fingerprint | --package | --root)
      [ $# -ge 2 ] || misuse "$1 needs a value"
      case $1 in
        --controller) controller=$2 ;;
        --token-file) token_file=$2 ;;
        --ca-fingerprint) fingerprint=$2 ;;
        --package) package=$2 ;;
        --root) root=${2%/} ;;
      esac
      shift 2
      ;;
    --help)
      usage
      exit 0
      ;;
    # A token on the command line would be in every process list: there is no such option.
    *) misuse "unknown argument: $1" ;;
  esac
done

[ -n "$controller" ] || misuse "--controller is missing"
[ -n "$token_file" ] || misuse "--token-file is missing"
[ -n "$fingerprint" ] || misuse "--ca-fingerprint is missing"

controller=${controller#https://}
controller=${controller%/}
port=${controller##*:}
host=${controller%:*}
case $controller in
  *[!A-Za-z0-9.:_[\]-]* | -*) misuse "--controller holds characters that no address has" ;;
  *:*) ;;
  *) misuse "--controller needs a port: HOST:PORT" ;;
esac
case $port in
  '' | *[!0-9]* | ??????*) misuse "--controller: the port is no number" ;;
esac
if [ "$port" -lt 1 ] || [ "$port" -gt 65535 ]; then misuse "--controller: the port is not within 1 to 65535"; fi
case $host in
  '') misuse "--controller needs a host" ;;
  \[*\]) ;;
  *:*) misuse "--controller: write an IPv6 address in brackets" ;;
esac

fingerprint=$(printf '%s' "${fingerprint#sha256:}" | tr -d ':' | tr 'A-F' 'a-f')
case $fingerprint in
  *[!0-9a-f]*) misuse "--ca-fingerprint holds other characters than hexadecimal digits" ;;
esac
[ ${#fingerprint} -eq 64 ] || misuse "--ca-fingerprint has ${#fingerprint} digits, not 64"

[ -r "$token_file" ] || misuse "--token-file: $token_file cannot be read"
token=$(head -c 4097 -- "$token_file")
case $token in
  '') misuse "--token-file: $token_file is empty" ;;
  *[!A-Za-z0-9._~+/=-]*) misuse "--token-file: $token_file holds more than a token" ;;
esac
[ ${#token} -le 4096 ] || misuse "--token-file: $token_file is too long for a token"

[ -n "$root" ] || [ "$(id -u)" -eq 0 ] || fail "run it as root"
command -v dpkg-deb >/dev/null || fail "dpkg is missing: the package is for Debian and its relatives"
if [ -n "$root" ] && [ ! -d "$root" ]; then misuse "--root: $root is no directory"; fi

if [ -z "$package" ]; then
  here=$(dirname -- "$0")
  for candidate in "$here"/palebluedot-agent_*.deb; do
    if [ -e "$candidate" ]; then package=$candidate; fi
  done
  [ -n "$package" ] || fail "there is no palebluedot-agent_*.deb beside this script; name it with --package"
fi
[ -r "$package" ] || misuse "--package: $package cannot be read"
name=$(dpkg-deb --field "$package" Package 2>/dev/null) || fail "$package is no Debian package"
[ "$name" = palebluedot-agent ] || fail "$package is $name, not palebluedot-agent"
version=$(dpkg-deb --field "$package" Version)

changed=no

if [ -n "$root" ]; then
  # What is configured stays, as dpkg does with configuration files.
  saved=''
  if [ -e "$root/etc/palebluedot/agent.env" ]; then
    saved=$(mktemp)
    cp -p -- "$root/etc/palebluedot/agent.env" "$saved"
  fi
  dpkg-deb --extract "$package" "$root/"
  if [ -n "$saved" ]; then
    cp -p -- "$saved" "$root/etc/palebluedot/agent.env"
    rm -f -- "$saved"
  fi
  mkdir -p "$root/var/lib/palebluedot-agent" "$root/etc/systemd/system/multi-user.target.wants"
  ln -sf /lib/systemd/system/palebluedot-agent.service \
    "$root/etc/systemd/system/multi-user.target.wants/palebluedot-agent.service"
else
  # shellcheck disable=SC2016 # the format is dpkg-query's, not the shell's
  installed=$(dpkg-query --show --showformat='${db:Status-Status} ${Version}' palebluedot-agent 2>/dev/null || true)
  if [ "$installed" = "installed $version" ]; then
    say "palebluedot-agent $version is installed already"
  else
    DEBIAN_FRONTEND=noninteractive dpkg --install --force-confold "$package" >&2 || fail "dpkg could not install $package"
    changed=yes
  fi
fi

configuration=$root/etc/palebluedot
[ -d "$configuration" ] || mkdir -m 0755 "$configuration"

# replace FILE: standard input becomes its content, in one step, mode 0600; only when it differs.
replace() {
  new=$(mktemp "$1.XXXXXX")
  cat >"$new"
  if [ -e "$1" ] && cmp -s -- "$new" "$1"; then
    rm -f -- "$new"
    chmod 0600 "$1"
  else
    mv -f -- "$new" "$1"
    changed=yes
  fi
}

# Other settings of the file stay as the operator left them.
[ -e "$configuration/agent.env" ] || : >"$configuration/agent.env"
awk -v controller="$controller" -v fingerprint="$fingerprint" '
  BEGIN {
    value["PALEBLUEDOT_CONTROLLER"] = controller
    value["PALEBLUEDOT_CA_FINGERPRINT"] = fingerprint
  }
  {
    name = $0
    sub(/=.*/, "", name)
    if (name in value) {
      if (!(name in seen)) print name "=" value[name]
      seen[name] = 1
    } else print
  }
  END {
    if (!("PALEBLUEDOT_CONTROLLER" in seen)) print "PALEBLUEDOT_CONTROLLER=" controller
    if (!("PALEBLUEDOT_CA_FINGERPRINT" in seen)) print "PALEBLUEDOT_CA_FINGERPRINT=" fingerprint
  }
' "$configuration/agent.env" | replace "$configuration/agent.env"

# printf is a part of the shell: the token is in no process list.
printf '%s\n' "$token" | replace "$configuration/join-token"

if [ -n "$root" ]; then
  say "installed palebluedot-agent $version into $root; it starts with the host"
elif [ -d /run/systemd/system ]; then
  systemctl enable palebluedot-agent.service >&2
  if [ "$changed" = yes ] || ! systemctl is-active --quiet palebluedot-agent.service; then
    systemctl restart palebluedot-agent.service
  fi
  say "palebluedot-agent $version runs; journalctl -u palebluedot-agent shows how it enrols"
else
  say "palebluedot-agent $version is installed; systemd is not running here, so nothing was started"
fi
