#!/usr/bin/env bash
# Creates the topics of the default configuration, if they are not there. Runs once, inside the Kafka image.
set -euo pipefail

server="${1:-kafka:19092}"
partitions="${PARTITIONS:-6}"

create() {
  # The broker's limit has to take what kafka.max_message_size (12MiB) allows.
  /opt/kafka/bin/kafka-topics.sh --bootstrap-server "$server" --create --if-not-exists --topic "$1" \
    --partitions "$partitions" --replication-factor 1 --config max.message.bytes=12582912 "${@:2}"
}

create blipstream.requests
create blipstream.captions
# People look at dead letters when they find the time.
create blipstream.dlq --config retention.ms=2592000000
