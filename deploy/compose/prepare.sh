#!/bin/sh
# Makes what compose.yaml mounts, beside this file: certificates and the database's password in secrets/, and config/,
# which is still empty. Needs OpenSSL 3. Changes nothing that exists, so to renew a certificate, remove its two files
# and run this again. docs/tls.md tells what the certificates are for.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p config secrets authority
cd secrets

new_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null; }

# Who has the authority's key can become the gateway: it is mounted nowhere, and best kept on another machine.
authority=../authority/ca
if [ ! -e ca.pem ]; then
  new_key "$authority.key"
  openssl req -x509 -key "$authority.key" -days 3650 -subj /CN=doorward-ca -out ca.pem
  echo "made secrets/ca.pem and authority/ca.key"
fi

issue() {  # NAME ALTERNATIVE_NAMES
  [ ! -e "$1.pem" ] || return 0
  [ -e "$authority.key" ] || { echo "prepare.sh: authority/ca.key is needed for $1.pem: bring it back" >&2; exit 1; }
  new_key "$1.key"
  openssl req -new -key "$1.key" -subj "/CN=$1" -addext "subjectAltName=$2" -out "$1.csr"
  openssl x509 -req -in "$1.csr" -CA ca.pem -CAkey "$authority.key" -CAcreateserial -CAserial "$authority.srl" \
    -days 365 -copy_extensions copy -out "$1.pem" 2>/dev/null
  rm "$1.csr"
  echo "made secrets/$1.pem and .key"
}

issue server DNS:server.doorward.internal,DNS:server,DNS:localhost
issue gateway DNS:gateway.doorward.internal
issue bot DNS:bot.doorward.internal
# Until a certificate that browsers trust is put in its place.
issue public DNS:localhost,IP:127.0.0.1

if [ ! -s postgres.password ]; then
  openssl rand -hex 32 > postgres.password
  echo "made secrets/postgres.password and secrets/pgpass"
fi
# The same password as libpq reads it.
printf '*:*:*:doorward:%s\n' "$(cat postgres.password)" > pgpass
