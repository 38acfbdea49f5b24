"""Writes and reads records with confluent-kafka: `confluent.py SERVERS write TOPIC` takes JSON lines, and
`confluent.py SERVERS read TOPIC COUNT` prints them."""

import json
import sys

from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition

PATIENCE = 30


def encoded(text):
    return None if text is None else text.encode()


def write(servers, topic):
    # Its own partitioner is another one than Java's; this is how its users get Java's.
    producer = Producer({"bootstrap.servers": servers, "partitioner": "murmur2_random", "compression.type": "zstd",
                         "enable.idempotence": True})
    failed = []
    for record in map(json.loads, sys.stdin):
        headers = [(name, encoded(value)) for name, value in record["headers"]]
        producer.produce(topic, key=encoded(record["key"]), value=encoded(record["value"]), headers=headers,
                         timestamp=record["timestamp"], on_delivery=lambda error, _: error and failed.append(error))
    if producer.flush(PATIENCE) or failed:
        sys.exit(f"not delivered: {failed}")


def read(servers, topic, count):
    # It wants a group's name, and never joins it.
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "reader", "enable.auto.commit": False,
                         "isolation.level": "read_committed"})
    partitions = consumer.list_topics(topic, PATIENCE).topics[topic].partitions
    consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
    for record in consumer.consume(int(count), PATIENCE):
        if record.error():
            sys.exit(str(record.error()))
        headers = [[name, None if value is None else value.decode()] for name, value in record.headers() or []]
        print(json.dumps({"partition": record.partition(), "offset": record.offset(), "timestamp": record.timestamp()[1],
                          "key": record.key().decode(), "value": record.value().decode(), "headers": headers}))
    consumer.close()


if __name__ == "__main__":
    servers, what, *arguments = sys.argv[1:]
    {"write": write, "read": read}[what](servers, *arguments)
